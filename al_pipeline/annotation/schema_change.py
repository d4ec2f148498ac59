"""Checks of class lists edited by hand: a new list needs a new schema version, and a class in use cannot be removed.

How classes in use are changed, `class_changes` knows.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from al_pipeline.sanitize import plain_form


class Classes(Protocol):
    """The keys of the `schema` section of `params.yaml` that these checks need."""

    @property
    def version(self) -> int:
        """Incremented with each new list of classes."""

    @property
    def labels(self) -> Sequence[str]:
        """The classes in display order."""


class Published(Struct, frozen=True):
    """The schema of the newest published round (or of the first build)."""

    version: int
    labels: tuple[str, ...]
    where: str
    """The name of that round or build, for messages."""


def missing_in_use(labels: Sequence[str], used: Mapping[str, str]) -> str | None:
    """Why `labels` cannot be the list of classes: annotations use a class that it lacks. None if it can.

    `used`: the number of annotations of each class in use, as text.
    """
    lost = [name for name in used if name not in labels]
    if not lost:
        return None
    name = shlex.quote(lost[0]) if len(lost) == 1 else "CLASS"
    looks = [f"{name!r} and {other!r} look the same" for name in lost if (other := _lookalike(name, labels))]
    hint = f" ({'; '.join(looks)})" if looks else ""
    return (
        f"answers name classes that schema.labels in params.yaml lacks: "
        f"{', '.join(f'{name!r} ({used[name]})' for name in lost)}{hint}. Nothing was changed. A class in use is not "
        "changed by editing: put it back into schema.labels, then use "
        f"`al schema rename {name} NEW`, `al schema merge {name},OTHER INTO NEW`, `al schema split {name} INTO B,C` or "
        f"`al schema retire {name}`, which also map the answers. `al labels revoke --label {name}` revokes them. A "
        "completely different list of classes needs a workspace of its own"
    )


def taken_away(labels: Sequence[str], former: Collection[str]) -> str | None:
    """Why `labels` cannot be the list of classes: it has one of `former`, which a change of classes took away."""
    back = [name for name in labels if name in former]
    if not back:
        return None
    return (
        f"schema.labels in params.yaml has {', '.join(map(repr, back))}, which a change of classes took away: late "
        "answers with that name belong to another class, or to none. Nothing was changed. Take it out of params.yaml, "
        f"then `al schema add {shlex.quote(back[0])}` makes it a class of its own again, and `al schema undo` undoes "
        "the last change"
    )


def wrong_version(before: Published, after: Classes) -> str | None:
    """Why the schema's version does not fit its list of classes; None if it does."""
    if after.version < before.version:
        return (
            f"schema.version in params.yaml is {after.version}, but {before.where} already has {before.version}; "
            "a version can only increase"
        )
    if after.version > before.version or tuple(after.labels) == before.labels:
        return None
    added = [name for name in after.labels if name not in before.labels]
    removed = [name for name in before.labels if name not in after.labels]
    parts = [
        f"{word} {', '.join(map(repr, names))}" for word, names in (("added", added), ("removed", removed)) if names
    ]
    parts = parts or ["the order changed, and with it keys and columns"]
    parts += [f"{name!r} looks like {like!r}" for name in added if (like := _lookalike(name, before.labels))]
    drops = (
        f" No answer that counts uses {' or '.join(map(repr, removed))}; open tasks will no longer offer it."
        if removed
        else ""
    )
    return (
        f"schema.labels in params.yaml is not that of {before.where} ({'; '.join(parts)}), but schema.version is still "
        f"{after.version}.{drops} A new list of classes is a new version: set schema.version to {after.version + 1}, "
        "or put the list back. Nothing was changed"
    )


def _lookalike(name: str, others: Sequence[str]) -> str | None:
    return next((other for other in others if other != name and plain_form(other) == plain_form(name)), None)
