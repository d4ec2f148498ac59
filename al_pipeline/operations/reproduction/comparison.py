"""Compare a reproduction with what was published: outputs and plan by bytes, or metrics within a tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import BadInput
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.files import json_line, read_json, read_object, sha256_bytes, sha256_file, sha256_tree
from al_pipeline.integrations.dvc.digests import digest
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.models.text_model import CARD_FILE
from al_pipeline.operations.history import read_history
from al_pipeline.operations.planning import plan_tasks
from al_pipeline.operations.reproduction.clone import Clone
from al_pipeline.operations.reproduction.result import Difference, Metric, Output, Source
from al_pipeline.records import LabeledItem
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_NAMES = (
    *("labeled", "test_labels", "unresolved", "model", "predictions", "control"),
    *("metrics", "metrics_csv", "confusion_csv", "scores", "histogram", "guided", "queries", "choice"),
)
OUTPUTS: Mapping[str, str] = {getattr(Layout(), name).as_posix(): name for name in _NAMES}
"""The outputs of the stages: path -> name in a round's record."""
_IN_RECORD = {"metrics": "metrics", "control": "control", "choice": "next_batch"}
"""Outputs whose content is in the record itself: name -> key."""
_PLAN = "plan"
"""The only output that no stage writes: the next round's plan, derived from the queries."""


@dataclass(frozen=True, slots=True)
class Published:
    """What was published, read before the stages overwrite it."""

    digests: Mapping[str, str | None]
    """Digest of each output, by path; None if the remote does not have it."""
    card: Mapping[str, Any]
    """The model's card; empty if it is missing or damaged."""
    labels: list[list[LabeledItem]]
    """The labelled sets of the pool and the test set, if they were requested."""


def read_published(clone: Clone, labels: bool) -> Published:
    """Read the published outputs in a clone whose stages have not run; with `labels`, the labelled sets too."""
    digests = {path: digest(clone.layout.root / path) for path in clone.output_paths()}
    try:
        card = read_object(clone.layout.model / CARD_FILE)
    except BadInput:
        card = {}
    return Published(digests, card, _labels(clone.layout) if labels else [])


def compare_outputs(clone: Clone, stage: str, published: Published) -> list[Output]:
    """Compare a stage's outputs with the published ones."""
    return [_compare(clone, stage, entry, published) for entry in clone.outputs(stage)]


def explain(clone: Clone, dvc: Dvc, stage: str, rows: Sequence[Output], published: Published) -> Difference | None:
    """The difference in a stage's outputs under the recorded engine, and its cause; None if there is none."""
    if other := [row.name for row in rows if not row.equal]:
        return _cause(clone, dvc, stage, other, published)
    return next((_contradiction(row) for row in rows if row.different), None)


def compare_plan(clone: Clone) -> tuple[Output, Difference | None]:
    """Derive the next round's plan from the queries again, and compare it with the published one."""
    upcoming = clone.record.round + 1
    before = read_history(clone.layout, clone.git, f"{clone.tag}^")
    tasks = plan_tasks(Workspace(clone.layout, clone.workspace.id), clone.git, upcoming, before.abandoned)
    sha256 = sha256_bytes("".join(json_line(task.to_row()) for task in tasks).encode())
    path = clone.layout.plan(upcoming)
    same: dict[Source, bool] = {
        "round.json": sha256 == clone.record.hashes.get(_PLAN),
        "published": path.exists() and sha256 == sha256_file(path),
    }
    row = _output(_PLAN, "", sha256, same)
    if row.equal:
        return row, _contradiction(row) if row.different else None
    return row, Difference("", "engine", "the plan derived from the queries differs; the stages are not the cause")


def compare_metrics(clone: Clone, tolerance: float) -> tuple[Metric, ...]:
    """Compare the metrics under another engine with the recorded ones."""
    made, rows = read_json(clone.layout.metrics, {}), []
    for name in FIGURES:
        was, now = clone.record.metrics.figure(name).value, made[name]["value"]
        near = was == now or None not in (was, now) and abs(was - now) <= tolerance
        rows.append(Metric(name, was, now, near))
    return tuple(rows)


def explain_metrics(
    clone: Clone, metrics: Sequence[Metric], published: Published, tolerance: float
) -> Difference | None:
    """The difference under another engine: labels must be equal, metrics within the tolerance. None if they are."""
    if published.labels and _labels(clone.layout) != published.labels:
        return Difference("label", "engine", "the labelled set differs: this engine aggregates answers differently")
    far = [row for row in metrics if not row.within_tolerance]
    if not far:
        return None
    moved = ", ".join(f"{row.name} {_shown(row.recorded)} → {_shown(row.reproduced)}" for row in far)
    return Difference("evaluate", "engine", f"changed by more than {tolerance:g} under another engine: {moved}")


def _compare(clone: Clone, stage: str, entry: Mapping[str, Any], published: Published) -> Output:
    path, record = clone.layout.root / entry["path"], clone.record
    name = OUTPUTS.get(entry["path"], entry["path"])
    md5, sha256 = digest(path), sha256_tree(path)
    same: dict[Source, bool] = {"dvc.lock": md5 == entry["md5"]}
    if name in record.hashes:
        same["round.json"] = sha256 == record.hashes[name]
    elif name in _IN_RECORD and _IN_RECORD[name] in (row := record.to_row()):
        same["round.json"] = read_json(path) == row[_IN_RECORD[name]]
    if there := published.digests[entry["path"]]:
        same["published"] = md5 == there
    return _output(name, stage, sha256, same)


def _cause(clone: Clone, dvc: Dvc, stage: str, names: Sequence[str], published: Published) -> Difference:
    """Find out why a stage with the recorded inputs, parameters and engine wrote different outputs.

    Runs the stage again to see whether it is deterministic.
    """
    message = f"{', '.join(names)} differs from everything that was published"
    card = read_json(clone.layout.model / CARD_FILE, {})
    if stage != "label" and card.get("vectors") != published.card.get("vectors"):
        return Difference(stage, "features", f"{message}: the encoder's vectors of the labelled items differ")
    paths = [clone.layout.root / entry["path"] for entry in clone.outputs(stage)]
    before = [digest(path) for path in paths]
    clone.run(dvc, stage)
    if [digest(path) for path in paths] == before:
        again = "two runs agree, so something that engine.json does not record has changed"
    else:
        again = "two runs differ: the stage is not deterministic"
    return Difference(
        stage, "engine", f"{message}, from the same inputs and parameters under the same engine.json; {again}"
    )


def _output(name: str, stage: str, sha256: str, same: Mapping[Source, bool]) -> Output:
    equal = tuple(source for source, is_equal in same.items() if is_equal)
    return Output(name, stage, sha256, equal, tuple(source for source in same if source not in equal))


def _contradiction(row: Output) -> Difference:
    equal, different = " and ".join(row.equal), " and ".join(row.different)
    return Difference(row.stage, "data", f"the rebuilt {row.name} equals {equal}, but {different} has something else")


def _labels(layout: Layout) -> list[list[LabeledItem]]:
    return [read_labeled(path) for path in (layout.labeled, layout.test_labels) if path.exists()]


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
