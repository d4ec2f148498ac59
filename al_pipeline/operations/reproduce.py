"""Reproduce published rounds in fresh clones from the DVC remote, and compare every byte.

A clean `dvc status` proves nothing: DVC takes outputs from its run cache, and its lock file says what was built, not
what would be. So a round is rebuilt from its sources, without the run cache or cached feature vectors, and the result
is compared with three things that were published: `dvc.lock`, the round's record, and the bytes themselves.

Nothing here writes to the workspace, takes its lock or talks to Label Studio: people may be labelling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from al_pipeline.errors import AlError, BadInput, NothingToDo, NotReproduced, RemoteIncomplete
from al_pipeline.features.device import device_like
from al_pipeline.integrations.environment import Engine, recorded_engine
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import read_history
from al_pipeline.operations.plugins import check_installed, other_packages
from al_pipeline.operations.reproduction.clone import Clone, remove_clones
from al_pipeline.operations.reproduction.comparison import (
    compare_metrics,
    compare_outputs,
    compare_plan,
    explain,
    explain_metrics,
    read_published,
)
from al_pipeline.operations.reproduction.result import Difference, FoundDifference, Metric, Output, Reproduction
from al_pipeline.records import round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.fingerprint import current_engine, difference, recorded_device, recorded_plugins
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import check_dvc
from al_pipeline.workspace.workspace import Workspace

TOLERANCE = 0.02
"""Tolerance for a metric under another engine. Another CPU or library changes it far less, another algorithm more."""


def reproduce(
    workspace: Workspace,
    numbers: Collection[int] | None,
    *,
    engine: str | None = None,
    tolerance: float = TOLERANCE,
    keep: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Reproduction]:
    """Reproduce rounds one after the other (`numbers` None: all published ones; empty: the latest).

    Under the recorded engine bytes are compared, under another one metrics within `tolerance`. `engine`: None for the
    running one, `recorded` to install the recorded one in an environment of its own, else the path of its sources
    (checkout or wheel). `keep` leaves the clones for inspection until the next call.

    Within one call, sources are fetched and vectors computed once, not once per round: the rounds of a growing pool
    share their objects. Outputs are fetched again for each round, since stages write theirs into the clone's cache.

    Raises NothingToDo if a round is not published, Locked if another call is running, AlError if it cannot be done.
    """
    records = _records(workspace, numbers)
    home = workspace.home / "reproduce"
    with locked(home / "lock", "al reproduce"):
        remove_clones(home)
        try:
            for record in records:
                other = _engine(record.engine.to_row(), engine, workspace.layout.root, on_progress)
                yield _reproduce(Clone(workspace, record, home, other, on_progress), tolerance, keep)
        finally:
            if not keep:
                remove_clones(home)


def failure(made: Iterable[Reproduction]) -> AlError | None:
    """The error for rounds that came out different from what was published; None if all are equal."""
    different = [one for one in made if one.difference is not None]
    if not different:
        return None
    names = ", ".join(round_name(one.round) for one in different)
    if all(one.difference and one.difference.missing for one in different):
        return RemoteIncomplete(
            f"the DVC remote lacks objects of {names}, or has damaged ones; run `al remote repair` in a clone that "
            "has them"
        )
    return NotReproduced(f"differs from what was published: {names}; `--keep` keeps the clone for inspection")


def _records(workspace: Workspace, numbers: Collection[int] | None) -> tuple[RoundRecord, ...]:
    """The records of the requested rounds. Raises NothingToDo if one is not published or has no tag here."""
    git = Git(workspace.layout.root)
    check_dvc(workspace.layout.root)  # its configuration says where the clones fetch data
    history = read_history(workspace.layout, git)
    records = history.rounds if numbers is None else history.rounds[-1:]
    if numbers:
        records = tuple(history.record(number) for number in numbers)
    if not records:
        raise NothingToDo("no round is published yet; `al status` says what the first one waits for")
    if untagged := [name for r in records if (name := round_name(r.round)) not in git.tags()]:
        raise NothingToDo(f"no tag here: {', '.join(untagged)}; `git fetch --tags`, or `al round` creates it")
    return records


def _engine(
    recorded: dict[str, Any], choice: str | None, root: Path, on_progress: Callable[[str], None]
) -> Engine | None:
    """The engine to run under; None for the running one, which is used whenever it equals the recorded one.

    Raises NothingToDo if this machine lacks the recorded device.
    """
    made_on = recorded_device(recorded)
    device = device_like(made_on)
    if choice is None:
        return None
    plugins = recorded_plugins(recorded)
    packages = other_packages(plugins, root)
    if not packages and not difference(recorded, current_engine(device)):
        return None
    if device != made_on:
        raise NothingToDo(
            f"the round was computed on {made_on}, and this machine has {device}; run `al` on such a machine, or leave "
            "`--engine` out: then metrics are compared"
        )
    wanted = {key: value for key, value in recorded.items() if key not in ("device", "plugins")}
    sources = None if choice == "recorded" else Path(choice)
    engine = recorded_engine(wanted, sources, on_progress, packages)
    if sources is None:  # other sources may compute digests in another way; their stages check them
        try:
            check_installed(plugins, packages, engine.library)
        except BadInput:
            engine.remove()
            raise
    return engine


@dataclass
class _Comparison:
    """The results of the comparison so far."""

    outputs: list[Output] = field(default_factory=list)
    metrics: tuple[Metric, ...] = ()


def _reproduce(clone: Clone, tolerance: float, keep: bool) -> Reproduction:
    """Reproduce one round; stop at a difference that makes further comparison pointless."""
    begin, compared = time.perf_counter(), _Comparison()
    try:
        found = _make(clone, compared, tolerance)
    except FoundDifference as stopped:
        found = stopped.difference
    finally:
        if not keep:
            clone.remove()
    return Reproduction(
        round=clone.record.round,
        compared="metrics" if clone.engine_changes else "bytes",
        engine=clone.engine_changes,
        outputs=tuple(compared.outputs),
        metrics=compared.metrics,
        difference=found,
        seconds=round(time.perf_counter() - begin, 3),
        folder=str(clone.layout.root) if keep else None,
    )


def _make(clone: Clone, compared: _Comparison, tolerance: float) -> Difference | None:
    """Clone, fetch, check the inputs, rebuild, compare the outputs; return the first difference."""
    clone.create()
    with clone.open_dvc() as dvc:
        dvc.stand_alone(clone.workspace.layout.root)
        clone.pull_missing_sources(dvc)
        clone.check_inputs()
        first = clone.pull_outputs(dvc)
        published = read_published(clone, labels=bool(clone.engine_changes) and first is None)
        if clone.engine_changes:
            clone.use_this_engine()
        clone.encode()
        for stage in STAGES:
            clone.run(dvc, stage)
            rows = compare_outputs(clone, stage, published)
            compared.outputs += rows
            if not clone.engine_changes:
                found = explain(clone, dvc, stage, rows, published)
                first = first or found
    if clone.engine_changes:
        if first is None:
            compared.metrics = compare_metrics(clone, tolerance)
            first = explain_metrics(clone, compared.metrics, published, tolerance)
        return first
    plan, found = compare_plan(clone)
    compared.outputs.append(plan)
    return first or found
