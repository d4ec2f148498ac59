"""The look that `al status` takes at Label Studio: it never raises, ends soon, and tells nobody else the token."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from annotating import ANN, SCHEMA, ServerRig, tasks_of
from embedded import LabelStudioServer
from harness import Played, answer_all, go_on
from test_label_studio import personal_token

from al_pipeline.integrations.label_studio import probe as label_studio_probe
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.probe import ServerStatus, is_writer, probe_server
from al_pipeline.integrations.label_studio.projects import ProjectMark
from al_pipeline.integrations.oracle import ProjectSpec
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import open_workspace

ID = "0123456789ab"


@contextlib.contextmanager
def server(
    status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None, wait: float = 0
) -> Iterator[Any]:
    """A server that says the same to everything; `requests` are those it got."""
    requests: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, self.headers.get("Authorization")))
            time.sleep(wait)
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.requests = requests  # type: ignore[attr-defined]
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        yield listener
        listener.shutdown()


def at(listener: Any) -> str:
    return f"http://127.0.0.1:{listener.server_address[1]}"


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (200, b'{"total": 7, "tasks": []}', "up"),
        (200, b"<html>", "odd"),
        (200, b"[]", "odd"),
        (200, b'{"total": "7"}', "odd"),
        (200, b'{"total": true}', "odd"),
        (200, b'{"total": -1}', "odd"),
        (200, b'{"total": ' + b"[" * 100_000, "odd"),
        (200, b"\xff\xfe", "odd"),
        (401, b"", "refused"),
        (403, b"", "refused"),
        (404, b"", "odd"),
        (500, b"", "down"),
        (503, b"", "down"),
    ],
)
def test_whatever_it_says_is_a_word(status: int, body: bytes, state: str) -> None:
    with server(status, body) as listener:
        found = probe_server(at(listener), "token", 1, ID, 0)
    assert (found.state, found.answered) == (state, 7 if state == "up" else None)
    assert bool(found.detail) == (state != "up")


OURS = ProjectMark(ID, "clone-1", "uid-1")


@pytest.mark.parametrize(
    ("status", "body", "is_ours"),
    [
        (200, json.dumps({"description": f"For all.\n{OURS}"}).encode(), True),
        (200, json.dumps({"description": str(ProjectMark(ID, "clone-2", "uid-1"))}).encode(), False),
        (200, json.dumps({"description": str(ProjectMark(ID, "clone-1", "uid-2"))}).encode(), False),
        (200, b'{"description": null}', False),
        (200, b"<html>", False),
        (404, json.dumps({"description": str(OURS)}).encode(), False),
    ],
)
def test_a_project_is_ours_where_it_says_so(status: int, body: bytes, is_ours: bool) -> None:
    with server(status, body) as listener:
        assert is_writer(at(listener), "token", 7, OURS, 5.0) is is_ours
        assert listener.requests == [("/api/projects/7/?include=description", "Token token")]


def test_whose_a_project_is_nobody_is_asked_elsewhere() -> None:
    assert not is_writer("https://labels.example.org", "token", 7, OURS, 5.0)


def test_nobody_there_is_down_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        begin = time.monotonic()
        assert probe_server(url, "token", 1, ID, 0) == ServerStatus("down", "Connection refused")
    assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize(
    "url", ["", "nonsense", "file:///etc/passwd", "http://", "http://[", "http://\n", "http://a b/"]
)
def test_an_address_that_is_none_is_odd_or_down(url: str) -> None:
    assert probe_server(url, "token", 1, ID, 0).state in ("odd", "down")


def test_it_waits_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that is slow, and for a name server that is out of reach."""
    with server(wait=3) as listener:
        begin = time.monotonic()
        assert probe_server(at(listener), "token", 1, ID, 0).state == "down"
        assert time.monotonic() - begin < 1.5
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    begin = time.monotonic()
    assert probe_server("http://labels.example.org", "token", 1, ID, 0) == ServerStatus("down", "no answer within 1 s")
    assert time.monotonic() - begin < 1.5


def test_the_token_is_sent_on_to_nobody() -> None:
    with server() as other, server(302, headers={"Location": at(other) + "/api/tasks"}) as listener:
        assert probe_server(at(listener), "secret", 1, ID, 0).state == "odd"
        assert other.requests == [] and listener.requests[0][1] == "Token secret"


def test_a_personal_access_token_buys_a_short_lived_one() -> None:
    with server(200, b'{"access": "short", "total": 3}') as listener:
        token = personal_token(time.time() + 300)
        assert probe_server(at(listener), token, 1, ID, 0).answered == 3
        assert [who for _, who in listener.requests] == [None, "Bearer short"]


def test_a_personal_access_token_that_ended_is_refused() -> None:
    with server(200, b'{"access": "short", "total": 3}') as listener:
        assert probe_server(at(listener), personal_token(1), 1, ID, 0).state == "refused"
        assert listener.requests == []


def test_without_a_round_it_only_asks_whether_the_server_is_up() -> None:
    with server() as listener:
        assert probe_server(at(listener), "secret", None, ID, None) == ServerStatus("up")
        assert listener.requests == [("/health", None)]


def test_status_counts_what_waits(started: Played, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    found = status(open_workspace(workspace.layout.root))
    assert (found.answered, found.answered_since, found.label_studio) == (0, None, None)
    keys = oracle.queue("ann@example.org")
    for key in keys[:3]:
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    oracle.answer(keys[3], "ann@example.org", "no class of ours")
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    workspace.store_credentials("http://127.0.0.1:9", "token")
    found = status(open_workspace(workspace.layout.root))
    assert (found.answered, found.answered_since) == (3, None) and found.label_studio.state == "down"
    monkeypatch.setattr(label_studio_probe, "probe_server", lambda *_: ServerStatus("up", "", 6))
    found = status(open_workspace(workspace.layout.root))
    assert (found.answered, found.answered_since) == (6, 2), "the refused one has been looked at"
    answer_all(oracle, truth)


@pytest.mark.server
def test_the_real_server_counts_the_tasks_of_the_round_that_people_answered(label_studio: LabelStudioServer) -> None:
    with LabelStudioOracle(label_studio.url, label_studio.token) as oracle, ServerRig(label_studio, oracle) as people:
        ref = oracle.ensure_project(ProjectSpec(ID, "c", SCHEMA))
        for number in (1, 2):
            oracle.import_tasks(ref, tasks_of(ID, number, 4))

        def answered(round: int, workspace_id: str = ID) -> ServerStatus:
            return probe_server(label_studio.url, label_studio.token, ref.project_id, workspace_id, round, seconds=30)

        assert answered(1) == ServerStatus("up", "", 0)
        people.answer(ref, f"{ID}:0001:item-0", ANN, "ham")
        people.answer(ref, f"{ID}:0001:item-1", ANN, "ham")
        people.skip(ref, f"{ID}:0001:item-2", ANN)
        assert (answered(1).answered, answered(2).answered, answered(1, "f" * 12).answered) == (2, 0, 0)
        assert probe_server(label_studio.url, "wrong", ref.project_id, ID, 1, seconds=30).state == "refused"
        people.delete_project(ref)
