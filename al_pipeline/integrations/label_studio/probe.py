"""Check cheaply whether Label Studio is up, with one plain request: no SDK, no httpx.

`probe_server` is for display only and takes at most a second, whatever the network does.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import asdict

from al_pipeline.integrations.label_studio.payloads import task_filter, task_query
from al_pipeline.integrations.label_studio.projects import ProjectMark, find_mark
from al_pipeline.integrations.label_studio.tokens import Authorization, TokenExpired
from al_pipeline.logs import get_logger
from al_pipeline.records import push_key
from al_pipeline.sanitize import on_this_machine

_logger = get_logger(__name__)

State = Literal["up", "down", "refused", "odd"]

_SECONDS = 0.9
_MOST_BYTES = 1_000_000


class ServerStatus(Struct, frozen=True):
    """The result of a probe."""

    state: State
    """`down`: no answer in time; `refused`: the token is refused; `odd`: something else answers."""
    detail: str = ""
    """Why it is not up, in words."""
    answered: int | None = None
    """The number of answered tasks in the open round; None if it was not asked for or not given."""

    def to_json(self) -> dict[str, Any]:
        """This as a JSON object."""
        return asdict(self)


def probe_server(
    url: str, token: str | None, project_id: int | None, workspace_id: str, round: int | None, seconds: float = _SECONDS
) -> ServerStatus:
    """Check that the Label Studio at `url` is up and accepts our token; count the answered tasks of `round`.

    Without token, project or round only the server's health is checked. Never raises for errors of the server or the
    network, and never takes longer than `seconds`.
    """
    found: list[ServerStatus] = []
    address = url.rstrip("/")

    def ask() -> None:
        try:
            if token is None or project_id is None or round is None:
                _get(f"{address}/health", {}, seconds)
                found.append(ServerStatus("up"))
            else:
                count = _answered(address, token, project_id, workspace_id, round, seconds)
                found.append(ServerStatus("up", answered=count))
        except Exception as error:  # any error becomes a status
            found.append(_failure(error))

    # A thread, since host name resolution has no timeout; a daemon, so that the process need not wait for it.
    thread = threading.Thread(target=ask, daemon=True)
    begin = time.perf_counter()
    thread.start()
    thread.join(seconds)
    result = found[0] if found else ServerStatus("down", f"no answer within {seconds:.0f} s")
    _logger.debug("Label Studio at %s: %s after %.3f s", address, result.state, time.perf_counter() - begin)
    return result


def is_writer(url: str, token: str, project_id: int, mark: ProjectMark, seconds: float) -> bool:
    """Whether a project of a Label Studio on this machine has exactly `mark`, found by requests without httpx.

    False for any other answer or error: the caller then asks through the client, which reports the reason.
    """
    address = url.rstrip("/")

    def post(path: str, body: Mapping[str, str]) -> Any:
        return json.loads(_get(f"{address}/{path}", {}, seconds, json.dumps(dict(body))))

    if not on_this_machine(url):
        return False
    try:
        headers = Authorization(token, post).header()
        found = json.loads(_get(f"{address}/api/projects/{project_id}/?include=description", headers, seconds))
        return find_mark(found["description"]) == mark
    except Exception as error:  # the client reports it
        _logger.debug(
            "Label Studio at %s did not say whose project %d is: %s", address, project_id, type(error).__name__
        )
        return False


def _answered(url: str, token: str, project_id: int, workspace_id: str, round: int, seconds: float) -> int:
    from urllib.parse import urlencode

    def post(path: str, body: Mapping[str, str]) -> Any:
        return json.loads(_get(f"{url}/{path}", {}, seconds, json.dumps(dict(body))))

    query = task_query(
        [
            task_filter("data.al_round", "equal", "Number", round),
            task_filter("data.push_key", "contains", "String", push_key(workspace_id, round, "")),
            task_filter("total_annotations", "greater", "Number", 0),
        ]
    )
    wanted = {"project": project_id, "page": 1, "page_size": 1, "fields": "task_only", "include": "id", "query": query}
    reply = _get(f"{url}/api/tasks/?{urlencode(wanted)}", Authorization(token, post).header(), seconds)
    total = json.loads(reply)["total"]
    if type(total) is not int or total < 0:
        raise ValueError("the number of tasks is not a whole number")
    return total


def _get(url: str, headers: dict[str, str], seconds: float, body: str | None = None) -> bytes:
    """The reply to one request. Redirects are not followed, so that no other server gets the token."""
    from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class Nowhere(HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    if not url.startswith(("http://", "https://")):
        raise ValueError("not the address of a server")
    handlers = [Nowhere(), *([ProxyHandler({})] if on_this_machine(url) else [])]
    if body is not None:
        headers = {**headers, "Content-Type": "application/json"}
    request = Request(url, None if body is None else body.encode(), headers)
    with build_opener(*handlers).open(request, timeout=seconds) as reply:
        content: bytes = reply.read(_MOST_BYTES)
        return content


def _failure(error: Exception) -> ServerStatus:
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError

    if isinstance(error, TokenExpired):
        return ServerStatus("refused", "it refuses the token (401)")
    if isinstance(error, HTTPError):
        if error.code in (401, 403):
            return ServerStatus("refused", f"it refuses the token ({error.code})")
        if error.code >= 500:
            return ServerStatus("down", f"it failed ({error.code})")
        return ServerStatus("odd", f"it answers {error.code}; is that the right address, and is Label Studio there?")
    if isinstance(error, TimeoutError) or (isinstance(error, URLError) and isinstance(error.reason, TimeoutError)):
        return ServerStatus("down", "no answer in time")
    if isinstance(error, URLError):
        reason = error.reason
        return ServerStatus("down", str(reason.strerror or reason) if isinstance(reason, OSError) else str(reason))
    if isinstance(error, OSError | HTTPException):
        return ServerStatus("down", f"the connection broke ({type(error).__name__})")
    return ServerStatus("odd", "its answer does not come from Label Studio")
