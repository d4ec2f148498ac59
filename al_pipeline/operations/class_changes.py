"""Change the classes: rename, merge, split, retire, add, and undo that. Each is an intervention, see `intervene`.

Its commit has the new `params.yaml` too. The tick that carries it out appends one event to the ledger, from which each
fold maps the answers (`annotation.class_changes`); no answer is edited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from al_pipeline.annotation.class_changes import classes_after
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import NothingToDo, UsageError
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import History
from al_pipeline.operations.intervene import (
    Change,
    change_by,
    commit_intervention,
    fold_after,
    locked_for_intervention,
    new_intervention,
    params_after,
    refuse_edited_params,
)
from al_pipeline.operations.schema import check_schema
from al_pipeline.operations.steps.closing import tasks_to_keep
from al_pipeline.params import is_class_name
from al_pipeline.records import ClassChange, LabeledItem, Part, Unresolved, composed
from al_pipeline.rounds.interventions import Intervention, class_changes
from al_pipeline.workspace.workspace import Workspace


class Asked(Struct, frozen=True):
    """What somebody asks for: a kind of change, the classes that leave, and those that come."""

    change: str
    old: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    again: bool = False


class Effect(Struct, frozen=True, kw_only=True):
    """What a change of classes does (or, in a dry run, would do)."""

    change: Change
    classes: tuple[tuple[str, ...], tuple[str, ...]]
    """All classes before and after."""
    labels: tuple[Mapping[str, int], Mapping[str, int]]
    """The number of labelled pool items of each class before and after."""
    test: tuple[Mapping[str, int], Mapping[str, int]]
    """The same for the test set."""
    asked_again: Mapping[Part, int]
    """Items that lose their label and are asked again."""
    ignored: Mapping[Part, int]
    """Items that lose their label and are ignored from then on."""
    tasks: tuple[int, int]
    """The open round's tasks, and how many of them stay with the annotators."""

    def to_json(self) -> dict[str, Any]:
        """This effect as a JSON object."""
        return {
            **self.change.to_json(),
            "classes_before": list(self.classes[0]),
            "classes_after": list(self.classes[1]),
            "labels_before": dict(self.labels[0]),
            "labels_after": dict(self.labels[1]),
            "test_labels_before": dict(self.test[0]),
            "test_labels_after": dict(self.test[1]),
            "asked_again": dict(self.asked_again),
            "ignored": dict(self.ignored),
            "open_tasks": self.tasks[0],
            "open_tasks_kept": self.tasks[1],
        }


def change_classes(workspace: Workspace, dvc: Dvc, asked: Asked, reason: str, *, dry_run: bool = False) -> Effect:
    """Change the classes. Raises UsageError if they cannot be changed so, NothingToDo if there is no answer yet."""
    with locked_for_intervention(workspace, dvc, f"al schema {asked.change}") as (git, history):
        check_schema(workspace, history)
        change = checked(asked, workspace.params.schema_.labels)
        layout = workspace.layout
        if not history.rounds and not any(event.label for event in read_events(layout.events, layout.inbox_events)):
            version = workspace.params.schema_.version + 1
            raise NothingToDo(
                f"there is no answer yet that the change could map: edit schema.labels in params.yaml, set "
                f"schema.version to {version}, and run `al round`"
            )
        intervention = new_intervention(
            history, git, "schema", reason, labels=True, change=change, before={"head": git.head()}
        )
        return _carry(workspace, git, history, intervention, dry_run=dry_run)


def undo_change(workspace: Workspace, dvc: Dvc, reason: str, *, dry_run: bool = False) -> Effect:
    """Undo the newest change of classes in force. Raises NothingToDo if there is none."""
    with locked_for_intervention(workspace, dvc, "al schema undo") as (git, history):
        changes = class_changes(history.interventions)
        if not changes:
            raise NothingToDo("no change of classes is in force; `al rounds` lists the interventions")
        last = changes[-1]
        check_schema(workspace, history)
        intervention = new_intervention(
            history, git, "undo", reason, labels=True, undoes=last.number,
            classes_from=(last.before or {}).get("head"), before={"head": git.head()},
        )  # fmt: skip
        return _carry(workspace, git, history, intervention, dry_run=dry_run)


def checked(asked: Asked, labels: Sequence[str]) -> ClassChange:
    """The change that `asked` names, of a schema with the classes `labels`. Raises UsageError if there is none."""
    old, new = (tuple(dict.fromkeys(map(composed, names))) for names in (asked.old, asked.new))
    if missing := [name for name in old if name not in labels]:
        raise UsageError(f"{missing[0]!r} is not a class; schema.labels in params.yaml has {', '.join(labels)}")
    coming = [name for name in new if name not in labels]
    if bad := [name for name in coming if not is_class_name(name) or "$" in name or name != name.strip()]:
        raise UsageError(
            f"{bad[0]!r} cannot be a class: a name has 1 to 100 characters, no `$`, no control character, and no "
            "blank at its ends"
        )
    if asked.change in ("rename", "add") and not coming:
        way = f"; `al schema merge {old[0]} INTO {new[0]}` makes two classes one" if old else ""
        raise UsageError(f"{new[0]!r} is a class already{way}")
    if asked.change == "merge":
        target = new[0]
        old = tuple(name for name in labels if name in old or name == target)
        if len(old) < 2:
            raise UsageError(f"a merge takes two classes or more, got {', '.join(old)}; `al schema rename` renames one")
    if asked.change == "split":
        if set(old) & set(new):
            raise UsageError(
                f"{old[0]!r} cannot be one of its own parts: late answers from pages that still show the old classes "
                "could not be told from new ones. Give the rest a new name; you can rename it later"
            )
        if len(new) < 2:
            raise UsageError("a split takes two parts or more; `al schema rename` gives a class another name")
    kinds = {kind: kind for kind in ("rename", "merge", "split", "retire", "add")}
    change = ClassChange(kinds[asked.change], tuple(labels), old, new, again=asked.again)  # type: ignore[arg-type]
    if len(classes_after(change)) < 2:
        raise UsageError(f"only {', '.join(classes_after(change))} would be left; a schema has at least two classes")
    return change


def _carry(workspace: Workspace, git: Git, history: History, intervention: Intervention, *, dry_run: bool) -> Effect:
    if any(one.params_from is not None for one in history.waiting):
        raise UsageError("a rollback with `--params` is not carried out yet, and would undo this: `al round` first")
    refuse_edited_params(workspace.layout, git)
    effect = _effect(workspace, git, history, intervention)
    if not dry_run:
        commit_intervention(workspace.layout, git, intervention)
        workspace.forget_params()
    return effect


def _effect(workspace: Workspace, git: Git, history: History, intervention: Intervention) -> Effect:
    waiting = history.waiting
    params = params_after(workspace, git, intervention)
    before = fold_after(workspace, waiting)
    after = fold_after(workspace, [*waiting, intervention], params)
    classes = tuple(workspace.params.schema_.labels), tuple(params.schema_.labels)
    had = _state(before.unresolved)
    new = [row for row in after.unresolved if had.get(row.item_id) != row.kind]
    kept = tasks_to_keep(workspace, git, history, [*waiting, intervention], params)
    return Effect(
        change=change_by(workspace, git, history, intervention),
        classes=classes,
        labels=(_by_class(before.labeled, classes[0]), _by_class(after.labeled, classes[1])),
        test=(_by_class(before.test, classes[0]), _by_class(after.test, classes[1])),
        asked_again=Counter(row.part for row in new if row.kind == "again"),
        ignored=Counter(row.part for row in new if row.kind == "ignored"),
        tasks=(len(history.open_tasks()), len(kept)),
    )


def _state(rows: Sequence[Unresolved]) -> dict[str, str]:
    return {row.item_id: row.kind for row in rows}


def _by_class(rows: Sequence[LabeledItem], classes: Sequence[str]) -> dict[str, int]:
    counts = Counter(row.label for row in rows)
    return {name: counts[name] for name in classes}
