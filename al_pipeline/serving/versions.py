"""The models that are served: the promoted one, which follows the workspace, and those of other rounds on request.

Those of other rounds are loaded one after the other in a queue of their own, which waits while a promoted model is
being loaded: whoever asks for many rounds delays no promotion.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import AlError, NothingToDo, ServerFailed
from al_pipeline.logs import get_logger
from al_pipeline.records import round_name

_logger = get_logger(__name__)

_POLL_SECONDS = 0.2
"""How often it is looked whether another model was promoted."""
_RETRY_SECONDS = 5.0
"""How long after a failure a model is loaded again, if nothing else changes before."""
_MOST_ASKED = 8
"""Models of other rounds that are loaded or wait for it."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model in memory, ready to predict."""

    round: int
    digest: str
    """The SHA-256 of its files, as the round's record has it."""
    runtime: str
    classes: tuple[str, ...]
    predict_proba: Callable[[Sequence[str]], NDArray[np.float64]]
    """Class probabilities (n, C) of texts; no row depends on the other texts."""
    gains: bool
    """Whether texts that are computed together take less time than one after the other."""

    @property
    def name(self) -> str:
        """The tag of its round."""
        return round_name(self.round)


class Source(Protocol):
    """Where models come from."""

    def mark(self) -> Hashable:
        """A value that changes whenever another model is promoted. Cheap: it is read several times a second."""
        ...

    def promoted(self) -> tuple[int, str] | None:
        """The round of the promoted model, and its digest; None if there is none."""
        ...

    def rounds(self) -> tuple[int, ...]:
        """The rounds whose models can be loaded, in their order, as of the last `promoted`."""
        ...

    def load(self, number: int) -> Served:
        """Load and try the model of a round. Raises AlError if that is not possible, or its digest is wrong."""
        ...


class TooManyRounds(Exception):
    """More models of other rounds wait to be loaded than the queue takes."""


class Versions:
    """The loaded models of a source. Models are loaded in threads; a model in use is never changed or unloaded."""

    def __init__(self, source: Source, kept: int) -> None:
        """`kept`: the number of models beside the promoted one that stay loaded."""
        self._source, self._kept = source, kept
        self.on_swap: Callable[[Served | None], None] = lambda _: None
        """Called with each model that becomes the promoted one."""
        self._current: Served | None = None
        self._others: OrderedDict[int, Served] = OrderedDict()
        self._keeping, self._ended = threading.Lock(), threading.Event()
        self._locks: dict[int, threading.Lock] = {}
        self._no_promotion = threading.Event()
        self._no_promotion.set()
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="al-serve-rounds")
        self._asked: dict[int, Future[Served]] = {}
        self._mark: Hashable = None
        self._retry_at = 0.0
        self._problem = "the model is being loaded"
        self._thread: threading.Thread | None = None

    @property
    def current(self) -> Served | None:
        """The promoted model; None if there is none, or it was never loaded."""
        return self._current

    @property
    def problem(self) -> str:
        """Why the promoted model is not served; empty if it is."""
        return self._problem

    @property
    def ended(self) -> bool:
        """Whether `close` was called."""
        return self._ended.is_set()

    def rounds(self) -> tuple[int, ...]:
        """The rounds whose models can be asked for, in their order."""
        return self._source.rounds()

    def start(self) -> None:
        """Load the promoted model, then follow the source in a thread, until `close`.

        Without a promoted model nothing is served until there is one. Raises AlError if it cannot be loaded.
        """
        self._mark = self._source.mark()
        self._follow()
        self._thread = threading.Thread(target=self._watch, name="al-serve-versions", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following, and loading."""
        self._ended.set()
        self._queue.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None:
            self._thread.join()

    def loaded(self, number: int) -> Served | None:
        """The model of a round, if it is in memory."""
        current = self._current
        return current if current is not None and current.round == number else self._others.get(number)

    def ask(self, number: int) -> Future[Served]:
        """The model of a round, loaded in the queue if necessary. Requests for one round share its loading.

        Raises NothingToDo for a round that is not published, TooManyRounds if the queue is full. The future raises
        AlError if the model cannot be loaded.
        """
        if number not in self._source.rounds():
            raise NothingToDo(f"{round_name(number)} is not published here")
        with self._keeping:
            asked = self._asked.get(number)
            if asked is None:
                if len(self._asked) >= _MOST_ASKED:
                    raise TooManyRounds(f"{_MOST_ASKED} models of other rounds wait to be loaded")
                asked = self._asked[number] = self._queue.submit(self._load_asked, number)
            return asked

    def _load_asked(self, number: int) -> Served:
        try:
            while not self._no_promotion.wait(_POLL_SECONDS):
                if self._ended.is_set():
                    raise ServerFailed("the server is ending")
            with self._lock_of(number):
                found = self.loaded(number)
                if found is None:
                    found = self._source.load(number)
                if found is not self._current:
                    self._keep(found)
                return found
        finally:
            with self._keeping:
                del self._asked[number]

    @contextmanager
    def _lock_of(self, number: int) -> Iterator[None]:
        """Nobody else loads this round's model in this context; those of others can be loaded meanwhile."""
        with self._keeping:
            lock = self._locks.setdefault(number, threading.Lock())
        with lock:
            yield

    def look(self) -> None:
        """Load what is promoted now, if that has changed.

        After a failure the old model stays, and it is tried again some seconds later.
        """
        mark = self._source.mark()
        if mark == self._mark and (not self._retry_at or time.monotonic() < self._retry_at):
            return
        try:
            self._follow()
        except Exception as error:  # whatever it is, the old model goes on serving
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._problem = str(error) if isinstance(error, AlError) else f"a bug: {type(error).__name__}"
            _logger.error("the promoted model was not loaded, the old one stays: %s", error)
        self._mark = mark

    def _follow(self) -> None:
        promoted = self._source.promoted()
        self._retry_at = 0.0
        current = self._current
        if promoted is None:
            self._swap(None)
            self._problem = "no model is promoted yet; `al rounds` shows why"
        elif current is None or (current.round, current.digest) != promoted:
            self._no_promotion.clear()
            try:
                with self._lock_of(promoted[0]):
                    found = self._others.get(promoted[0])
                    if found is None or found.digest != promoted[1]:
                        found = self._source.load(promoted[0])
                    self._swap(found)
            finally:
                self._no_promotion.set()
            self._problem = ""
        else:
            self._problem = ""

    def _swap(self, model: Served | None) -> None:
        """Serve another model from the next request on; those that wait keep the model that they came with."""
        old, self._current = self._current, model
        if old is not model:
            _logger.info("serving %s in place of %s", model and model.name, old and old.name)
            self.on_swap(model)
        if old is not None and old is not model:
            self._keep(old)

    def _keep(self, model: Served) -> None:
        with self._keeping:
            self._others[model.round] = model
            self._others.move_to_end(model.round)
            while len(self._others) > self._kept:
                self._others.popitem(last=False)

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self.look()
            except Exception as error:  # the mark could not be read
                _logger.error("the workspace could not be looked at: %s", error)
