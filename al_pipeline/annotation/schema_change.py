"""Checks changes of the list of classes: a new list is a new version of the schema, and a class in use stays."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from al_pipeline.sanitize import plain_form


class Classes(Protocol):
    """The `schema` section of `params.yaml`, as far as it matters here."""

    @property
    def version(self) -> int:
        """Raised with each new list of classes."""

    @property
    def labels(self) -> Sequence[str]:
        """The classes in the order shown."""


@dataclass(frozen=True, slots=True)
class Published:
    """The schema of the newest published round (or the first build), and that round in words."""

    version: int
    labels: tuple[str, ...]
    where: str


def missing_in_use(labels: Sequence[str], used: Mapping[str, str]) -> str | None:
    """Why the classes `labels` cannot be taken: answers use another one. None where they can.

    `used` says of each class that answers name how many there are, in words.
    """
    lost = [name for name in used if name not in labels]
    if not lost:
        return None
    name = shlex.quote(lost[0]) if len(lost) == 1 else "CLASS"
    looks = [f"{name!r} differs from {other!r} in form alone" for name in lost if (other := _lookalike(name, labels))]
    hint = f" ({'; '.join(looks)})" if looks else ""
    return (
        f"answers name classes that schema.labels in params.yaml lacks: "
        f"{', '.join(f'{name!r} ({used[name]})' for name in lost)}{hint}. Nothing was changed. A class in use can be "
        "neither removed nor renamed nor merged into another: put it back into schema.labels, at the end if nobody "
        f"should choose it again, or take its answers out with `al labels revoke --label {name}`. Other classes "
        "altogether need a workspace of their own"
    )


def wrong_version(before: Published, after: Classes) -> str | None:
    """Why the version does not fit what became of the list of classes; None where it does."""
    if after.version < before.version:
        return (
            f"schema.version in params.yaml is {after.version}, and {before.where} has {before.version} already; "
            "a version is only ever raised"
        )
    if after.version > before.version or tuple(after.labels) == before.labels:
        return None
    added = [name for name in after.labels if name not in before.labels]
    removed = [name for name in before.labels if name not in after.labels]
    parts = [
        f"{word} {', '.join(map(repr, names))}" for word, names in (("added", added), ("removed", removed)) if names
    ]
    parts = parts or ["another order, and so other keys and other columns"]
    parts += [f"{name!r} looks like {like!r}" for name in added if (like := _lookalike(name, before.labels))]
    drops = (
        f" No answer that counts uses {' or '.join(map(repr, removed))}; tasks that are open will no longer offer it."
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
