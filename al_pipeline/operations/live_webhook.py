"""Label Studio's webhook for `al live`: it only makes the next look come sooner, and polling goes on beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from al_pipeline.errors import AlError, LabelStudioRefused, NothingToDo
from al_pipeline.live.listener import SECRET_HEADER, Listener
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.workspace.workspace import Workspace


@contextmanager
def told(workspace: Workspace, listener: Listener) -> Iterator[None]:
    """Have Label Studio tell `listener` of answers while the context lasts.

    Raises LabelStudioRefused, saying what to set, if its server may not send requests to this machine.
    """
    project = stored_project(workspace.layout)
    if project is None:
        raise NothingToDo("the workspace has no project in Label Studio yet; `al round` makes one")
    with connect(workspace) as oracle:
        try:
            number = oracle.add_webhook(project, f"{listener.url}/wake", {SECRET_HEADER: listener.secret})
        except LabelStudioRefused as error:
            raise LabelStudioRefused(
                f"{error}. Label Studio sends no requests to this machine's own addresses unless it runs with "
                "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS=false; without `--webhook`, `al live` asks it each second"
            ) from None
    try:
        yield
    finally:
        with suppress(AlError), connect(workspace) as oracle:
            oracle.remove_webhook(number)
