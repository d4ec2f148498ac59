"""The pool's shards as Prefect tasks, run by the workers of a Dask or Ray cluster (`engine.runner`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from al_pipeline.errors import AlError, ExternalServiceError, UsageError
from al_pipeline.operations.clusters import no_address, not_installed
from al_pipeline.operations.encoding import WORKER, Shard, Shards

OUTSTANDING = 64
"""The maximum number of shards that workers have or wait for; bounds the memory for texts and vectors."""
_CONNECT_SECONDS = 60
_ATTEMPTS = 3
"""The number of attempts to connect to a Ray cluster."""
_PAUSE_SECONDS = 5.0
_PATIENCE = 3600.0
"""Seconds without a finished shard after which the cluster counts as stuck."""
_SAY_EVERY = 10.0

SHARDS: ContextVar[Shards] = ContextVar("shards")
"""The work of `al_encode`. No parameter, since Prefect's server stores parameters."""


def run_shards(shards: Shards) -> None:
    """Run every shard as a Prefect task on the cluster, in a flow run below the tick's.

    Raises UsageError if the engine is not installed or no cluster is named, ExternalServiceError if the cluster fails,
    and what a worker raises.
    """
    reset = SHARDS.set(shards)
    try:
        with OPENERS[shards.runner]() as task_runner:
            al_encode.with_options(task_runner=task_runner)()
    finally:
        SHARDS.reset(reset)


# Prefect sends a task and its flow to workers, decorated functions by value: each only calls another, sent by name.


@task(name="al-shard", persist_result=False, cache_policy=NO_CACHE)
def encode_shard(order: bytes) -> bytes:
    """Encode one shard, on a worker; see `features.remote`."""
    return encode_here(order)


@flow(name="al-encode", persist_result=False, validate_parameters=False)
def al_encode() -> None:
    """Encode the texts that have no vectors yet: a task for each shard. Each result is stored when it arrives."""
    encode_all()


def encode_here(order: bytes) -> bytes:
    """The worker's side of `encode_shard`."""
    return WORKER.encode(order, _threads())


def encode_all() -> None:
    """Submit the shards and store what comes back, `OUTSTANDING` at a time."""
    shards, waiting, done = SHARDS.get(), dict[int, tuple[Shard, PrefectFuture[bytes]]](), SimpleQueue[int]()
    progress = _Progress(shards)
    for shard in shards.orders:
        if len(waiting) == OUTSTANDING:
            _accept_one(shards, waiting, done, progress)
        name = f"shard {shard.number} of {shards.count}"
        future = encode_shard.with_options(task_run_name=name).submit(shard.order)
        waiting[shard.number] = shard, future
        future.add_done_callback(_putting(done, shard.number))
    while waiting:
        _accept_one(shards, waiting, done, progress)


def _putting(done: SimpleQueue[int], number: int) -> Callable[[Any], None]:
    return lambda _: done.put(number)


def _accept_one(
    shards: Shards,
    waiting: dict[int, tuple[Shard, PrefectFuture[bytes]]],
    done: SimpleQueue[int],
    progress: _Progress,
) -> None:
    """Wait for a shard and store its vectors. Its future is dropped: an engine computes what is still held again."""
    try:
        number = done.get(timeout=_PATIENCE)
    except Empty:
        raise ExternalServiceError(
            f"no shard was encoded for {_PATIENCE / 60:.0f} minutes; does the {shards.runner} cluster have workers?"
        ) from None
    shard, future = waiting.pop(number)
    try:
        reply = future.result()
    except AlError:
        raise
    except Exception as error:  # whatever the engine raises
        raise ExternalServiceError(
            f"the {shards.runner} cluster did not encode shard {number} of {shards.count} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); `al round` goes on with what is missing"
        ) from error
    shards.accept(shard, reply)
    progress.add(len(shard.hashes))


class _Progress:
    """A progress artifact on Prefect's page, and lines in the log."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._done = 0
        self._begin = self._said = time.monotonic()
        self._logger = get_run_logger()
        self._artifact: UUID | None = None
        with suppress(httpx.HTTPError):
            found = create_progress_artifact(0.0, description=f"encoding {shards.texts:,} texts")
            self._artifact = found if isinstance(found, UUID) else None
        self._logger.info("%d texts in %d shards go to the %s cluster", shards.texts, shards.count, shards.runner)

    def add(self, texts: int) -> None:
        """Count texts that are stored."""
        self._done += texts
        now = time.monotonic()
        if self._done < self._shards.texts and now - self._said < _SAY_EVERY:
            return
        self._said = now
        self._logger.info(
            "%d of %d texts encoded (%.0f texts/s)", self._done, self._shards.texts, self._done / (now - self._begin)
        )
        if self._artifact is not None:
            with suppress(httpx.HTTPError):
                update_progress_artifact(self._artifact, min(100.0, 100 * self._done / self._shards.texts))


# Clusters ----------------------------------------------------------------------------------------------------------


@contextmanager
def _dask() -> Iterator[TaskRunner[Any]]:
    """Runs tasks on the Dask cluster of `DASK_SCHEDULER_ADDRESS`, once it has a worker."""
    try:
        import dask
        from distributed import Client
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UsageError(not_installed("dask", error)) from None
    address = dask.config.get("scheduler-address", None)
    if not address:
        raise UsageError(no_address("dask"))
    try:
        with Client(address, timeout=_CONNECT_SECONDS, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise ExternalServiceError(_no_cluster("dask", address, error)) from error
    yield DaskTaskRunner(address=address)


@contextmanager
def _ray() -> Iterator[TaskRunner[Any]]:
    """Runs tasks on the Ray cluster of `RAY_ADDRESS`."""
    try:
        import ray
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise UsageError(not_installed("ray", error)) from None
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UsageError(no_address("ray"))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(address, namespace="prefect", log_to_driver=False, logging_level=logging.ERROR)
            break
        except (OSError, RuntimeError, ValueError) as error:  # on a busy head, the process for this client starts late
            if attempt == _ATTEMPTS:
                raise ExternalServiceError(_no_cluster("ray", address, error)) from error
            ray.shutdown()
            time.sleep(_PAUSE_SECONDS * attempt)
    try:
        yield RayTaskRunner(address=address)
    finally:
        ray.shutdown()


OPENERS: dict[str, Callable[[], AbstractContextManager[TaskRunner[Any]]]] = {"dask": _dask, "ray": _ray}
"""For each `engine.runner` that is a cluster: connects to it, and gives its task runner.

Raises UsageError if it is not installed or named, ExternalServiceError if it does not answer.
"""


def _threads() -> int | None:
    """The threads that this worker may use: those of a Dask worker, `OMP_NUM_THREADS` as Ray sets it, or all CPUs."""
    with suppress(ImportError, ValueError):
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else None


def _no_cluster(runner: str, address: str, error: Exception) -> str:
    why = " ".join(str(error).split())[:300]
    return f"the {runner} cluster at {address} gives no worker ({type(error).__name__}: {why}); is it up?"
