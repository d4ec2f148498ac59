"""Put the DVC remote right from a clone that has the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from al_pipeline.integrations.dvc.session import RemoteDefect, describe_defects
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
    """Objects."""
    defects: tuple[RemoteDefect, ...]
    """What the remote still lacks or holds other bytes of: this clone does not have it either."""

    @property
    def lacking(self) -> str:
        """The first few of `defects`, each by its name, with what is wrong."""
        return describe_defects(self.defects)

    def to_json(self) -> dict[str, Any]:
        """This as a JSON object."""
        wrong = [{"name": one.name, "object": one.object, "at": one.at, "why": one.why} for one in self.defects]
        return {"sent": self.sent, "wrong": wrong}


def repair_remote(workspace: Workspace) -> Repaired:
    """Send the DVC remote what it lacks, or holds other bytes of, of the work tree and of every published round.

    Each object is proved by its digest before it is sent, and again in the remote. Raises Locked, RepositoryError.
    """
    layout = workspace.layout
    with locked(layout.lock, "al remote repair"), open_dvc(layout) as dvc:
        git = Git(layout.root)
        tags = git.tags()
        names = [round_name(record.round) for record in read_history(layout, git).rounds]
        sent, defects = dvc.repair_remote([name for name in names if name in tags])
    return Repaired(sent, tuple(defects))
