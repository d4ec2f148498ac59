"""Repair the DVC remote from a clone that has the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from al_pipeline.integrations.dvc.defects import RemoteDefect, describe_defects
from al_pipeline.integrations.git import Git
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.records import round_name
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Repaired:
    """What `repair_remote` did."""

    sent: int
    """Number of objects."""
    defects: tuple[RemoteDefect, ...]
    """Objects that the remote still lacks or holds damaged: this clone does not have them either."""

    @property
    def lacking(self) -> str:
        """Names of the first few `defects`, each with what is wrong."""
        return describe_defects(self.defects)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        wrong = [{"name": one.name, "object": one.object, "at": one.at, "why": one.why} for one in self.defects]
        return {"sent": self.sent, "wrong": wrong}


def repair_remote(workspace: Workspace) -> Repaired:
    """Send the DVC remote the objects of the work tree and of every published round that it lacks or holds damaged.

    Each object is verified by digest before it is sent, and again in the remote. Raises Locked, RepositoryError.
    """
    layout = workspace.layout
    with locked(layout.lock, "al remote repair"), open_dvc(layout) as dvc:
        git = Git(layout.root)
        tags = git.tags()
        names = [round_name(record.round) for record in read_history(layout, git).rounds]
        sent, defects = dvc.repair_remote([name for name in names if name in tags])
    return Repaired(sent, tuple(defects))
