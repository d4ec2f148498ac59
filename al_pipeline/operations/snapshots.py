"""Read the labels of published rounds, whatever is checked out: from DVC's cache or the remote, by digest."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.errors import RemoteIncomplete, RepositoryError
from al_pipeline.files import sha256_file
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.operations.facts import open_dvc
from al_pipeline.records import LabeledItem, Unresolved, round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

Labels = Mapping[str, LabeledItem | Unresolved]
"""Result of folding the answers, by item id; an item that is not in it has no answer that counts."""
NAMES = ("labeled", "test_labels", "unresolved")


@contextmanager
def snapshots(workspace: Workspace) -> Iterator[Callable[[RoundRecord], Labels]]:
    """Yield a function that returns the labels of a round, given its record. Takes no lock and checks nothing out.

    The function raises RemoteIncomplete if they cannot be obtained, RepositoryError if they do not match the record.
    """
    with (
        tempfile.TemporaryDirectory(prefix="al-snapshots-") as place,
        replace(open_dvc(workspace.layout), state=None) as dvc,
    ):
        yield lambda record: _labels(workspace.layout, dvc, record, Path(place))


def _labels(layout: Layout, dvc: Dvc, record: RoundRecord, place: Path) -> Labels:
    name = round_name(record.round)
    found: dict[str, LabeledItem | Unresolved] = {}
    for kind in NAMES:
        path: Path = getattr(layout, kind)
        target = place / f"{record.hashes[kind]}{path.suffix}"
        if not target.exists():
            try:
                dvc.get(path.relative_to(layout.root).as_posix(), name, target)
            except (RepositoryError, RemoteIncomplete) as error:
                raise RemoteIncomplete(
                    f"{path.name} of {name} is available neither here nor in the DVC remote: {error}"
                ) from None
        if sha256_file(target) != record.hashes[kind]:
            raise RepositoryError(f"{path.name} of {name} does not match its record; `al reproduce` shows more")
        rows: list[LabeledItem] | list[Unresolved]
        rows = read_unresolved(target) if kind == "unresolved" else read_labeled(target)
        found |= {row.item_id: row for row in rows}
    return found
