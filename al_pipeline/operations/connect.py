"""The Label Studio that a workspace talks to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from al_pipeline.errors import LabelStudioRefused
from al_pipeline.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.label_studio import LabelStudioOracle


def connect(workspace: Workspace) -> LabelStudioOracle:
    """A client for the workspace's Label Studio; sends nothing yet. Raises LabelStudioRefused where none is known."""
    from al_pipeline.label_studio import LabelStudioOracle

    known = workspace.credentials()
    if missing := [name for name in ("url", "token") if name not in known]:
        variables = " and ".join(f"AL_LABEL_STUDIO_{name.upper()}" for name in missing)
        raise LabelStudioRefused(
            f"no {' and no '.join(missing)} of a Label Studio is known here; `al labelstudio start` runs one, "
            f"`al labelstudio connect URL` takes yours, or set {variables}"
        )
    return LabelStudioOracle(known["url"], known["token"], workspace.params.label_studio.timeout_seconds)
