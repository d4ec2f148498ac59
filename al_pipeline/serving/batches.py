"""Texts of requests that arrive together, computed together; a bounded queue before that.

A request keeps the model that it came with: however models change meanwhile, its answer is of one model. Large requests
are computed in parts, with those of other requests between them. Where a batch takes no less time than its texts one by
one (`Served.gains`), several small ones are computed side by side, so that a text does not wait for a longer one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from al_pipeline.serving.versions import Served

Floats = NDArray[np.float64]

_LONGEST_WAIT = 60
"""The largest Retry-After, in seconds."""
_SMOOTHING = 0.2


class QueueFull(Exception):
    """More texts wait than the queue takes."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many texts wait; try again in {seconds} s")
        self.seconds = seconds
        """When there is room again, at the rate of the last batches."""


class TimedOut(Exception):
    """The answer was not there in time."""


class Closed(Exception):
    """The server ends."""


@dataclass(eq=False)
class _Job:
    model: Served
    texts: Sequence[str]
    future: asyncio.Future[Floats]
    taken: int = 0
    """Texts that were given to the model's threads."""
    parts: dict[int, Floats] = field(default_factory=dict)
    """What is computed, by the place of its first text."""


class _Part(NamedTuple):
    job: _Job
    start: int
    end: int


class Batcher:
    """Predicts for many requests at once. Use it from one event loop, between `start` and `close`."""

    def __init__(
        self,
        batch_texts: int,
        window: float,
        queue_texts: int,
        timeout: float,
        on_batch: Callable[[Served, int, float], None] = lambda *_: None,
        workers: int = 1,
    ) -> None:
        """`window`, `timeout`: seconds. `on_batch` gets model, number of texts and seconds of each batch.

        `workers`: the number of threads that compute.
        """
        self._batch_texts, self._window, self._queue_texts, self._timeout = batch_texts, window, queue_texts, timeout
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._seconds_per_text = 0.0
        self._wake = asyncio.Event()
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="al-serve-model")
        self._computing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of texts in the queue."""
        return self._waiting

    def start(self) -> None:
        """Begin to compute."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Refuse what waits, and end after the batches that are being computed."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown()

    async def predict(self, model: Served, texts: Sequence[str]) -> Floats:
        """Class probabilities (n, C) of `texts` by `model`.

        Raises QueueFull or Closed at once, TimedOut when the time has passed, and whatever the model raises.
        """
        if self._closed:
            raise Closed
        if self._waiting and self._waiting + len(texts) > self._queue_texts:
            raise QueueFull(self._retry_after())
        job = _Job(model, texts, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._waiting += len(texts)
        self._wake.set()
        try:
            return await asyncio.wait_for(job.future, self._timeout)
        except TimeoutError:
            raise TimedOut from None
        finally:
            if job in self._jobs:  # given up before all of it was taken
                self._jobs.remove(job)
                self._waiting -= len(texts) - job.taken

    def _retry_after(self) -> int:
        return min(_LONGEST_WAIT, max(1, math.ceil(self._waiting * self._seconds_per_text)))

    async def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            side_by_side = 1 if not self._jobs or self._jobs[0].model.gains else self._workers
            if not self._jobs or len(self._computing) >= side_by_side:
                await self._wake.wait()
                continue
            if self._window and self._jobs[0].model.gains and self._waiting < self._batch_texts:
                await asyncio.sleep(self._window)
            share = self._batch_texts if side_by_side == 1 else math.ceil(self._waiting / side_by_side)
            parts = self._take(max(1, min(self._batch_texts, share)))
            if parts:
                task = asyncio.create_task(self._compute_all(parts))
                self._computing.add(task)
                task.add_done_callback(self._ended)
        await asyncio.gather(*self._computing)
        for job in self._jobs:
            if not job.future.done():
                job.future.set_exception(Closed())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._computing.discard(task)
        self._wake.set()

    async def _compute_all(self, parts: Sequence[_Part]) -> None:
        if not await self._compute(parts) and len(parts) > 1:
            for part in parts:  # the text that fails must not fail the requests beside it
                await self._compute([part], last=True)

    async def _compute(self, parts: Sequence[_Part], last: bool = False) -> bool:
        """Predict these parts and hand the answers out; whether the model did not fail.

        `last`: if it fails, so do the requests; else only that of a single part does.
        """
        texts = [text for job, start, end in parts for text in job.texts[start:end]]
        model, begin = parts[0].job.model, time.perf_counter()
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._pool, model.predict_proba, texts)
            if len(found) != len(texts):
                raise RuntimeError(f"{len(found)} rows for {len(texts)} texts")
        except Exception as error:
            for job, _, _ in parts if last or len(parts) == 1 else ():
                if not job.future.done():
                    job.future.set_exception(error)
            return False
        self._note(model, len(texts), time.perf_counter() - begin)
        self._give(parts, found)
        return True

    def _take(self, room: int) -> list[_Part]:
        """The next texts, of one model, at most `room`; jobs that need more go to the end of the queue."""
        parts: list[_Part] = []
        later = []
        while self._jobs and room:
            job = self._jobs.popleft()
            if job.future.done():  # given up, or a part of it failed
                self._waiting -= len(job.texts) - job.taken
                job.taken = len(job.texts)
                continue
            if parts and job.model is not parts[0].job.model:
                later.append(job)
                continue
            end = min(len(job.texts), job.taken + room)
            parts.append(_Part(job, job.taken, end))
            room -= end - job.taken
            self._waiting -= end - job.taken
            job.taken = end
        self._jobs.extendleft(reversed(later))
        self._jobs.extend(part.job for part in parts if part.job.taken < len(part.job.texts))
        return parts

    def _give(self, parts: Sequence[_Part], found: Floats) -> None:
        place = 0
        for job, start, end in parts:
            job.parts[start] = found[place : (place := place + end - start)]
            if sum(map(len, job.parts.values())) == len(job.texts) and not job.future.done():
                job.future.set_result(np.concatenate([job.parts[begin] for begin in sorted(job.parts)]))

    def _note(self, model: Served, texts: int, seconds: float) -> None:
        own = seconds / texts
        self._seconds_per_text += _SMOOTHING * (own - self._seconds_per_text) if self._seconds_per_text else own
        self._on_batch(model, texts, seconds)
