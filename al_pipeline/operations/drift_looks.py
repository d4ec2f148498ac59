"""Ticks look at the newest kept requests from time to time (`drift` in params.yaml), and say if they differ.

A look takes seconds and much memory, so a process of its own makes it. What it finds goes to a file that status,
report, notifications and `al serve` read. A look that fails is told of and never fails a tick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from al_pipeline.drift.look import Look, Looks, followed
from al_pipeline.errors import AlError, BadInput
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.files import write_bytes
from al_pipeline.logs import get_logger
from al_pipeline.workspace.home import SECRET_VARIABLES, own_environment
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

_logger = get_logger(__name__)

_MOST_DAYS = 30.0
"""How far a look goes back at most, such as the first."""
_TIMEOUT = 900.0
_WORDS, _NEWEST = 20, 10
_NICE = 10

Run = Callable[[str, Callable[[], None]], object]
"""Runs an action under a name; a tick passes its own runner."""


def read_looks(layout: Layout) -> Looks | None:
    """The newest look; None before the first attempt. Raises BadInput if the file is damaged."""
    try:
        return msgspec.json.decode(layout.drift.read_bytes(), type=Looks)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeError):
        raise BadInput(f"{layout.drift} is damaged; delete it: the next tick looks again") from None


def forget_request(layout: Layout, request_id: str) -> None:
    """Take a deleted request out of the newest look, and all new words, since nobody knows in which requests they are.

    Raises BadInput if the file is damaged.
    """
    found = read_looks(layout)
    look = None if found is None else found.look
    if found is not None and look is not None:
        newest = tuple(one for one in look.newest if one.rpartition(":")[0] != request_id)
        if look.words or newest != look.newest:
            _write(layout, replace(found, look=replace(look, words=(), newest=newest)))


def look_at_requests(workspace: Workspace, now: float, run: Run) -> list[str]:
    """Look at the requests since the last look, if that is due; return messages for the user.

    `now`: seconds since 1970. Call it while holding the workspace's lock.
    """
    layout = workspace.layout
    try:
        if not _is_due(workspace, now):
            return []
        run("drift", lambda: _look(layout, now))
        found = read_looks(layout)
    except (AlError, OSError) as error:
        return [f"kept requests could not be compared with the pool: {error}"]
    if found is None or found.tried_at != now:  # it was killed, or took too long: not at each tick again
        problem = "the comparison did not end; `al drift` shows what is wrong"
        with suppress(OSError):  # a full disk: the next tick tries again
            _write(layout, replace(found or Looks(tried_at=now), tried_at=now, problem=problem))
        return [f"kept requests could not be compared with the pool: {problem}"]
    return []


def _is_due(workspace: Workspace, now: float) -> bool:
    hours, layout = workspace.params.drift.every_hours, workspace.layout
    if not hours or not any(layout.traffic.glob("*-*")):
        return False
    found = read_looks(layout)
    return found is None or not found.tried_at <= now < found.tried_at + hours * 3600


def _look(layout: Layout, now: float) -> None:
    """Have a process of its own make the look."""
    from al_pipeline.integrations import processes as child

    environment = {**os.environ, **own_environment()}
    for name in SECRET_VARIABLES:
        environment.pop(name, None)
    command = [sys.executable, "-P", "-m", __name__, repr(now)]
    code = child.run(command, layout.root, environment, layout.looking, _TIMEOUT)
    _logger.info("the comparison of kept requests with the pool ended with %s", code)


def main(root: Path, now: float) -> None:
    """Look at the kept requests of a workspace until `now`, and write what is found."""
    workspace = open_workspace(root)
    before = read_looks(workspace.layout)
    last = None if before is None else before.look
    try:
        looks = Looks(tried_at=now, look=_made(workspace, now, last))
    except AlError as error:
        looks = Looks(tried_at=now, look=last, problem=str(error))
    _write(workspace.layout, looks)


def _made(workspace: Workspace, now: float, last: Look | None) -> Look:
    from al_pipeline.drift.assessment import DOMAIN
    from al_pipeline.operations.drift import drift, kept_requests

    since = max(0.0 if last is None else last.until, now - _MOST_DAYS * 86_400)
    made = drift(workspace, kept_requests(workspace, since, now), store=False)
    found = made.drift
    most = max(_NEWEST, workspace.params.traffic.novel)
    newest = [str(row["id"]) for row in found.newest(most)] if DOMAIN in found.found else []
    look = Look(
        since=since,
        until=now,
        round=made.round,
        rows=made.rows,
        texts=found.window,
        found=found.found,
        p_values=found.p_values,
        words=tuple(one.word for one in found.words(_WORDS)),
        newest=tuple(newest),
        accuracy=Estimate(
            value=found.accuracy.value,
            low=found.accuracy.low,
            high=found.accuracy.high,
            reason=found.accuracy.reason,
        ),
        measured=None if made.on_requests is None else made.on_requests.accuracy_of_requests,
    )
    return replace(look, alarm_since=followed(look, last))


def _write(layout: Layout, looks: Looks) -> None:
    write_bytes(layout.drift, msgspec.json.format(msgspec.json.encode(looks), indent=2) + b"\n", 0o600)


if __name__ == "__main__":
    with suppress(OSError):
        os.nice(_NICE)
    main(Path.cwd(), float(sys.argv[1]))
