"""Make interventions: roll back and undo that, revoke and restore answers, approve a model, pause and resume.

An intervention is one small file and one commit, which has `params.yaml` too if it changes the classes. The next tick
applies its changes to the labels, in the same way as it closes a round: an event in the ledger, a new fold, a build, a
tag. A kill at any line therefore leaves either nothing or an intervention that the next tick finishes.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.annotation.active_events import CONTROLS, standing_answers
from al_pipeline.annotation.aggregation import Folded, fold_by
from al_pipeline.annotation.class_changes import classes_after
from al_pipeline.annotation.votes import labels_in_use
from al_pipeline.data.ledger import last_part, part_ids, read_events, read_forecasts
from al_pipeline.errors import (
    AlError,
    ExternalServiceError,
    ManualActionRequired,
    NothingToDo,
    RemoteIncomplete,
    UnexpectedChange,
    UsageError,
)
from al_pipeline.evaluation.figures import FIGURES, Metrics
from al_pipeline.files import sha256_file, sha256_tree, temporary_folder, write_bytes, write_json
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.checkout import check_not_ignored, check_ready
from al_pipeline.operations.close import carry_out
from al_pipeline.operations.connect import refuse_elsewhere
from al_pipeline.operations.facts import check_owned, open_dvc
from al_pipeline.operations.history import History, read_history
from al_pipeline.params import Params, parse_params
from al_pipeline.records import Event, LabeledItem, Selection, is_of_review, moment, round_name
from al_pipeline.rounds.interventions import (
    Intervention,
    Kind,
    class_changes,
    intervention_number,
    read_intervention,
    undoable,
)
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.home import user_name
from al_pipeline.workspace.identity import check_identity
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.params_classes import with_change, with_classes_of
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

_FOLDED = ("labeled", "test_labels", "unresolved")
_FOLDED_PATHS = {name: f"data/{name}.parquet" for name in _FOLDED}


class Change(Struct, frozen=True):
    """What an intervention changes (or, in a dry run, would change)."""

    intervention: Intervention
    leaving: tuple[tuple[int, str, int], ...]
    """Answers that stop counting, as (round, annotator, count)."""
    coming: tuple[tuple[int, str, int], ...]
    """Answers that count again, in the same form."""
    labels: tuple[int, int]
    """The size of the labelled set before and after."""
    changed: int
    """The number of pool items that lose, gain or change their label."""
    served: tuple[str | None, str | None]
    """The tag of the round whose model is promoted, before and after."""
    metrics: tuple[Metrics | None, Metrics | None]
    """Before and after. A rollback of labels: the newest round's and the target round's. A rollback of the model alone,
    or the undo of a model's rollback: those of the promoted models. Otherwise both are the newest round's."""
    params: tuple[str, ...] = ()
    """The sections of `params.yaml` that change."""

    def to_json(self) -> dict[str, Any]:
        """This change as a JSON object."""
        before, after = (
            {} if found is None else {name: found.figure(name).value for name in FIGURES} for found in self.metrics
        )
        return {
            "intervention": self.intervention.to_row(),
            "leaving": [dict(zip(("round", "annotator", "answers"), row, strict=True)) for row in self.leaving],
            "coming": [dict(zip(("round", "annotator", "answers"), row, strict=True)) for row in self.coming],
            "labelled_before": self.labels[0],
            "labelled_after": self.labels[1],
            "labels_changed": self.changed,
            "served_before": self.served[0],
            "served_after": self.served[1],
            "metrics_before": before,
            "metrics_after": after,
            "params": list(self.params),
        }


def rollback(
    workspace: Workspace,
    dvc: Dvc,
    number: int,
    *,
    labels: bool,
    model: bool,
    params: bool,
    reason: str,
    dry_run: bool = False,
) -> Change:
    """Roll back to the snapshot of round `number`: its labels, its promoted model, its parameters.

    Classes that were changed since go back with the labels.
    First verifies that the snapshot's data are available and that the fold will equal the snapshot's. Otherwise raises
    with nothing changed: RemoteIncomplete, ManualActionRequired, or NothingToDo if there is nothing to roll back. `dvc`
    must not be running a command.
    """
    with locked_for_intervention(workspace, dvc, "al rollback") as (git, history):
        record, tag = history.record(number), round_name(number)
        then = _history_at_snapshot(workspace.layout, git, record)
        serves = then.promoted if model else None
        if model and serves is None:
            raise NothingToDo(f"no model was promoted at {tag}; use `--labels` to go back to its labels only")
        other_classes = (
            labels and not params and class_changes(then.interventions) != class_changes(history.interventions)
        )
        if params or other_classes:
            refuse_edited_params(workspace.layout, git)
        if not labels and not params and serves == history.promoted and history.holding is not None:
            raise NothingToDo(f"the model of {serves} is already served, and promotion is held")
        intervention = new_intervention(
            history, git, "rollback", reason, labels=labels, to=number,
            serves=serves, hold=True if model else None, params_from=tag if params else None,
            classes_from=tag if other_classes else None,
            before={"serves": history.promoted, "hold": history.holding is not None, "head": git.head()},
        )  # fmt: skip
        change = _change_to_snapshot(workspace, git, dvc, history, record, intervention)
        if not dry_run:
            commit_intervention(workspace.layout, git, change.intervention)
            workspace.forget_params()
        return change


def undo(workspace: Workspace, dvc: Dvc, reason: str, *, dry_run: bool = False) -> Change:
    """Undo the newest rollback in force: its labels count again, and its changes to model and parameters are reverted.

    Raises NothingToDo if no rollback is in force.
    """
    with locked_for_intervention(workspace, dvc, "al rollback --undo") as (git, history):
        last = undoable(history.interventions)
        if last is None:
            raise NothingToDo("there is no rollback to undo; `al rounds` lists them")
        before = last.before or {}
        if last.classes_from:
            refuse_edited_params(workspace.layout, git)
        intervention = new_intervention(
            history, git, "undo", reason, labels=last.labels, undoes=last.number,
            serves=before.get("serves") if last.serves else None,
            hold=bool(before.get("hold")) if last.hold is not None else None,
            params_from=before.get("head") if last.params_from else None,
            classes_from=before.get("head") if last.classes_from else None,
        )  # fmt: skip
        change = change_by(workspace, git, history, intervention)
        if intervention.serves:
            change = replace(change, metrics=_served(history, intervention.serves))
        if not dry_run:
            commit_intervention(workspace.layout, git, intervention)
            workspace.forget_params()
        return change


def amend(
    workspace: Workspace, dvc: Dvc, kind: Kind, selection: Selection, reason: str, *, dry_run: bool = False
) -> Change:
    """Revoke or restore the answers that `selection` matches. Raises UsageError if empty, NothingToDo if none match."""
    if selection == Selection():
        raise UsageError(
            "select answers: --annotator, --round, --since, --label or --item (an answer must meet all that are given)"
        )
    if selection.since is not None:
        try:
            selection = replace(selection, since=moment(selection.since).isoformat())
        except ValueError:
            raise UsageError(
                f"--since must be a date or a time such as 2026-03-01T14:00, got {selection.since!r}"
            ) from None
    with locked_for_intervention(workspace, dvc, f"al labels {kind}") as (git, history):
        intervention = new_intervention(history, git, kind, reason, labels=True, selection=selection)
        change = change_by(workspace, git, history, intervention)
        if not change.leaving and not change.coming:
            what = "counts" if kind == "revoke" else "is quarantined"
            raise NothingToDo(f"no answer that {what} matches: {selection}; `al log ITEM` shows an item's answers")
        if not dry_run:
            commit_intervention(workspace.layout, git, intervention)
        return change


def approve(workspace: Workspace, dvc: Dvc, number: int | None, reason: str) -> Intervention:
    """Promote the model of round `number` (default: the newest published) and release the hold on later models."""
    with locked_for_intervention(workspace, dvc, "al approve", data=False) as (git, history):
        if not history.rounds:
            raise NothingToDo("no round is published yet")
        record = history.rounds[-1] if number is None else history.record(number)
        tag = round_name(record.round)
        if history.holding is None and history.promoted == tag:
            raise NothingToDo(f"the model of {tag} is already promoted, and no model is held")
        intervention = new_intervention(history, git, "approve", reason, serves=tag, hold=False)
        commit_intervention(workspace.layout, git, intervention)
        return intervention


def pause(workspace: Workspace, dvc: Dvc, reason: str) -> Intervention:
    """Make ticks do nothing until `resume`; after that they finish a build in progress."""
    with locked_for_intervention(workspace, dvc, "al pause", data=False) as (git, history):
        if history.pausing:
            raise NothingToDo(f"it is already paused: {history.pausing.sentence()}")
        intervention = new_intervention(history, git, "pause", reason)
        commit_intervention(workspace.layout, git, intervention)
        return intervention


def resume(workspace: Workspace, dvc: Dvc, reason: str) -> Intervention:
    """End the pause of ticks."""
    with locked_for_intervention(workspace, dvc, "al resume", data=False) as (git, history):
        if not history.pausing:
            raise NothingToDo("it is not paused; `al status` says what it waits for")
        intervention = new_intervention(history, git, "resume", reason)
        commit_intervention(workspace.layout, git, intervention)
        return intervention


@contextmanager
def dvc_for_intervention(workspace: Workspace, *, dry_run: bool = False) -> Iterator[Dvc]:
    """DVC for an intervention. Raises WrongProject if another clone runs the ticks that would carry it out."""
    if not dry_run:
        refuse_elsewhere(workspace)
    with open_dvc(workspace.layout) as dvc:
        yield dvc


def published_with(workspace: Workspace, intervention: Intervention, unfinished: str) -> int | None:
    """The newest published round, once `intervention` is in force; None if no round is published.

    Raises ExternalServiceError while it waits for a tick; `unfinished` says why the last one ended early.
    """
    history = read_history(workspace.layout, Git(workspace.layout.root))
    if any(waiting.number == intervention.number for waiting in history.waiting):
        raise ExternalServiceError(
            f"the intervention is recorded; the next `al round` carries it out. {unfinished}".rstrip()
        )
    return history.rounds[-1].round if history.rounds else None


def finish_intervention(layout: Layout, git: Git) -> bool:
    """Commit an intervention or a review's plan that a kill left uncommitted, with the classes that an intervention
    gives `params.yaml`. Returns whether there was one.


    Call only while holding the lock. Raises UnexpectedChange if somebody edited a committed one, or `params.yaml`
    since.
    """
    left = git.changed([layout.interventions, layout.reviews])
    if not left:
        return False
    if edited := [name for name in left if git.show("HEAD", name) is not None]:
        kind = "reviews" if edited[0].startswith(f"rounds/{layout.reviews.name}/") else "interventions"
        raise UnexpectedChange(f"{kind} must not be edited: {', '.join(edited)}; `git checkout -- FILE` restores them")
    paths = [folder for folder in (layout.interventions, layout.reviews) if folder.exists()]
    for name in left:
        if intervention_number(name) is None:
            continue
        intervention = read_intervention((layout.root / name).read_text(encoding="utf-8"), name)
        if intervention.changes_classes:
            _finish_params(layout, git, params_text(layout, git, intervention))
            paths.append(layout.params)
    git.commit("Finish an intervention whose making was interrupted", paths)
    return True


def _finish_params(layout: Layout, git: Git, wanted: str) -> None:
    """Write the `params.yaml` of an interrupted intervention. Raises UnexpectedChange if somebody edited it."""
    now = layout.params.read_bytes().decode("utf-8", "replace")
    if now not in (wanted, git.show("HEAD", layout.params.name)):
        raise UnexpectedChange(
            "params.yaml was changed while the classes were being changed; `git checkout -- params.yaml` undoes that"
        )
    if now != wanted:
        write_bytes(layout.params, wanted.encode())


def check_snapshot(workspace: Workspace, git: Git, dvc: Dvc, interventions: Sequence[Intervention]) -> None:
    """Raise ManualActionRequired if a rollback, the last of `interventions`, would not restore its snapshot's labels.

    Parameters may have been edited since the rollback was made and checked. Both checks use `_same_fold`, so they
    agree on what is equal.
    """
    if not interventions or interventions[-1].kind != "rollback":
        return
    layout = workspace.layout
    record = read_history(layout, git).record(interventions[-1].to or 0)
    with temporary_folder(layout.private) as place:
        folded = fold_after(workspace, interventions, snapshot=interventions[-1].parts)
        _same_fold(folded, record, lambda: _prove(dvc, record, place, _FOLDED_PATHS))


# Making an intervention ----------------------------------------------------------------------------------------------


@contextmanager
def locked_for_intervention(
    workspace: Workspace, dvc: Dvc, purpose: str, *, data: bool = True
) -> Iterator[tuple[Git, History]]:
    """Hold the lock, check the workspace as a tick does, and yield its repository and history.

    `data`: whether the intervention depends on the pool and the ledger. Others must work while the data are missing or
    damaged: that is when people pause. Raises NothingToDo before the first plan.
    """
    layout = workspace.layout
    with locked(layout.lock, purpose):
        check_identity(layout)
        dvc.end_previous()
        git = Git(layout.root)
        check_ready(layout, git)
        if data:
            check_not_ignored(layout, git)
        if finish_intervention(layout, git):
            workspace.forget_params()
        history = read_history(layout, git)
        if history.planned is None:
            raise NothingToDo("no round is planned yet; `al round` makes the first plan")
        check_owned(workspace, git, dvc, history, datetime.now(UTC), sources=data)
        yield git, history


def new_intervention(history: History, git: Git, kind: Kind, reason: str, **values: Any) -> Intervention:
    assert history.planned is not None
    return Intervention(
        number=1 + max((intervention.number for intervention in history.interventions), default=0),
        kind=kind,
        round=history.planned,
        by=git.identity() or user_name(),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        reason=reason,
        **values,
    )


def commit_intervention(layout: Layout, git: Git, intervention: Intervention) -> None:
    paths = [layout.intervention(intervention.number)]
    text = params_text(layout, git, intervention) if intervention.changes_classes else None
    write_json(paths[0], intervention.to_row())
    if text is not None:
        write_bytes(layout.params, text.encode())
        paths.append(layout.params)
    git.commit(f"Intervention {intervention.number}: {intervention.sentence()}", paths)
    _logger.info("intervention %d: %s", intervention.number, intervention.sentence())


def _history_at_snapshot(layout: Layout, git: Git, record: RoundRecord) -> History:
    """The history as of a round's tag. Raises NothingToDo or ManualActionRequired if the tag is no snapshot of it."""
    tag = round_name(record.round)
    if tag not in git.tags():
        raise NothingToDo(f"{tag} has no tag yet; `al round` creates it, then roll back")
    history = read_history(layout, git, tag)
    if record not in history.rounds or history.latest != record:
        raise ManualActionRequired(
            f"the tag {tag} does not name the commit that published that round, so it is not a snapshot of it: "
            "`al doctor` shows the right commit; nothing was changed"
        )
    return history


def _change_to_snapshot(
    workspace: Workspace, git: Git, dvc: Dvc, history: History, record: RoundRecord, rollback: Intervention
) -> Change:
    """What `rollback` changes, with the ledger part that it goes back to.

    Raises RemoteIncomplete or ManualActionRequired if the snapshot's files are unavailable or damaged, or its labels
    would not be restored.
    """
    wanted = {"events": "data/events", **_FOLDED_PATHS}
    if rollback.serves is not None:
        wanted["model"] = "models/candidate"
    with temporary_folder(workspace.layout.private) as place:
        snapshot = _prove(dvc, record, place, wanted)
        if not rollback.labels:
            change = change_by(workspace, git, history, rollback)
            return replace(change, metrics=_served(history, rollback.serves))
        rollback = replace(rollback, parts=last_part(snapshot / "events"))
        change = change_by(workspace, git, history, rollback)
        after = [*history.waiting, rollback]
        folded = fold_after(workspace, after, params_after(workspace, git, rollback), snapshot=rollback.parts)
        _same_fold(folded, record, lambda: snapshot)
        return replace(change, metrics=(change.metrics[0], record.metrics))


def _prove(dvc: Dvc, record: RoundRecord, place: Path, wanted: Mapping[str, str]) -> Path:
    """Fetch files that a round published into `place`; `wanted` maps each name there to its path in the workspace.

    Raises RemoteIncomplete if one is unavailable, ManualActionRequired if one differs from the round's record.
    """
    tag = round_name(record.round)
    for name, path in wanted.items():
        try:
            dvc.get(path, tag, place / name)
        except AlError as error:
            raise RemoteIncomplete(
                f"{path} of {tag} is available neither here nor in the DVC remote; nothing was changed. {error}"
            ) from None
        if name in record.hashes and sha256_tree(place / name) != record.hashes[name]:
            raise ManualActionRequired(
                f"{path} of {tag} does not match the round's record, so a rollback would restore other "
                f"{'labels' if name in _FOLDED else 'bytes'} than were published; nothing was changed. `al reproduce "
                f"{record.round}` shows more"
            )
    return place


def params_text(layout: Layout, git: Git, intervention: Intervention) -> str:
    """The committed `params.yaml` with the classes that an intervention gives it. Raises BadParams if it is invalid."""
    text = git.show("HEAD", layout.params.name) or ""
    if intervention.change is not None:
        return with_change(text, intervention.change, classes_after(intervention.change))
    revision = intervention.classes_from or "HEAD"
    other = git.show(revision, layout.params.name)
    if other is None:
        raise UnexpectedChange(f"{layout.params.name} of {revision[:12]}, whose classes are wanted, is missing in git")
    undone = None
    if intervention.kind == "undo" and intervention.undoes is not None:
        path = layout.intervention(intervention.undoes).relative_to(layout.root).as_posix()
        undone = read_intervention(git.show("HEAD", path) or "", path).change
    known = parse_params(text).schema_.labels if undone is None else classes_after(undone)
    return with_classes_of(text, other, known)


def refuse_edited_params(layout: Layout, git: Git) -> None:
    """Raise UnexpectedChange if `params.yaml` has edits that the commit of an intervention would contain."""
    if git.changed([layout.params]):
        raise UnexpectedChange("params.yaml has uncommitted changes; commit or discard them first (`git diff`)")


def params_after(workspace: Workspace, git: Git, intervention: Intervention) -> Params:
    """The parameters in force once `intervention` is carried out."""
    if intervention.changes_classes:
        return parse_params(params_text(workspace.layout, git, intervention))
    if intervention.params_from is None:
        return workspace.params
    name = workspace.layout.params.name
    return parse_params(git.show(intervention.params_from, name) or "", f"{name} of {intervention.params_from}")


def _fold_with(workspace: Workspace, git: Git, intervention: Intervention, history: History) -> Folded:
    """The labels once the waiting interventions and `intervention` are carried out."""
    return fold_after(workspace, [*history.waiting, intervention], params_after(workspace, git, intervention))


def fold_after(
    workspace: Workspace,
    interventions: Sequence[Intervention],
    params: Params | None = None,
    *,
    all_classes: bool = False,
    snapshot: int | None = None,
) -> Folded:
    """The labels once `interventions` are carried out. `all_classes`: include classes that the schema lacks.

    `snapshot`: the last ledger part of the one that the last intervention, a rollback, goes back to; what reviewers
    ruled since, and what was decided on it, is then left out, since the rollback leaves it in force.
    """
    layout = workspace.layout
    params = params or workspace.params
    events = [*read_events(layout.events, layout.inbox_events), *carry_out(interventions, layout.events)]
    if snapshot is not None and any(is_of_review(event.annotation_key) for event in events):
        known = part_ids(layout.events, snapshot)
        rollback = next((event.event_id for event in reversed(events) if event.type in CONTROLS), None)
        events = [
            event
            for event in events
            if event.event_id in known
            or event.event_id == rollback
            or not (event.type in CONTROLS or is_of_review(event.annotation_key))
        ]
    classes = [*params.schema_.labels, *sorted(labels_in_use(events))] if all_classes else params.schema_.labels
    return fold_by(params, events, partial(read_forecasts, layout.events), list(dict.fromkeys(classes)))


def _same_fold(folded: Folded, record: RoundRecord, snapshot: Callable[[], Path]) -> None:
    """Raise ManualActionRequired if `folded` differs from what the round published. All comparisons are made here.

    `folded` leaves out what reviewers ruled since.

    Equal bytes are equal. Another version of pyarrow may write equal rows as different bytes, so if bytes differ, the
    rows are compared with those in the folder that `snapshot` returns; it is called only then.
    """
    from al_pipeline.data.outputs import read_labeled, read_unresolved, write_labeled, write_unresolved

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_labeled(place / "labeled", folded.labeled)
        write_labeled(place / "test_labels", folded.test)
        write_unresolved(place / "unresolved", folded.unresolved)
        differ = [part for part in _FOLDED if sha256_file(place / part) != record.hashes[part]]
    if differ:
        place = snapshot()
        rows = {"labeled": folded.labeled, "test_labels": folded.test, "unresolved": folded.unresolved}
        readers: dict[str, Any] = {"labeled": read_labeled, "test_labels": read_labeled, "unresolved": read_unresolved}
        differ = [part for part in differ if tuple(readers[part](place / part)) != rows[part]]
    if differ:
        raise ManualActionRequired(
            f"the labels would differ from those of {round_name(record.round)} ({', '.join(differ)}), because schema, "
            "annotators, labels or select.relabel in params.yaml have changed since; nothing was changed. `--params` "
            "restores them too"
        )


def _served(history: History, serves: str | None) -> tuple[Metrics | None, Metrics | None]:
    """The metrics of the promoted model, and of the one that `serves` names."""
    return _metrics(history, history.promoted), _metrics(history, serves)


def _metrics(history: History, tag: str | None) -> Metrics | None:
    """The metrics of the round with this tag; None if there is no such round."""
    return next((record.metrics for record in history.rounds if round_name(record.round) == tag), None)


def change_by(workspace: Workspace, git: Git, history: History, intervention: Intervention) -> Change:
    """What `intervention` changes, after those that wait."""
    layout = workspace.layout
    events = read_events(layout.events, layout.inbox_events)
    waiting = history.waiting
    now = standing_answers([*events, *carry_out(waiting, layout.events)])
    then = (
        standing_answers([*events, *carry_out([*waiting, intervention], layout.events)]) if intervention.labels else now
    )
    # A revocation may remove the answers with a class that params.yaml dropped; a tick refuses any that remain.
    old = _labels(fold_after(workspace, waiting, all_classes=True).labeled)
    new = old
    if intervention.kind == "revoke":
        new = _labels(fold_after(workspace, [*waiting, intervention], all_classes=True).labeled)
    elif intervention.labels:
        new = _labels(_fold_with(workspace, git, intervention, history).labeled)
    newest = history.rounds[-1].metrics if history.rounds else None
    mine, theirs = (msgspec.to_builtins(p) for p in (workspace.params, params_after(workspace, git, intervention)))
    return Change(
        intervention=intervention,
        leaving=_by_person(_without(now, then)),
        coming=_by_person(_without(then, now)),
        labels=(len(old), len(new)),
        changed=sum(old.get(item) != new.get(item) for item in old.keys() | new.keys()),
        served=(history.promoted, intervention.serves or history.promoted),
        metrics=(newest, newest),
        params=tuple(name for name in mine if mine[name] != theirs.get(name)),
    )


def _labels(rows: Sequence[LabeledItem]) -> dict[str, str]:
    return {row.item_id: row.label for row in rows}


def _without(events: Mapping[str, Event], others: Mapping[str, Event]) -> list[Event]:
    """Those of `events`, by annotation key, that are not the newest ones in `others` too."""
    ids = {event.event_id for event in others.values()}
    return [event for event in events.values() if event.event_id not in ids]


def _by_person(events: Sequence[Event]) -> tuple[tuple[int, str, int], ...]:
    counted = Counter((event.round, event.annotator) for event in events)
    return tuple((number, who, count) for (number, who), count in sorted(counted.items()))
