"""What is Label Studio's own: its config, its errors, its settings. The contract of all oracles: test_oracle."""

from __future__ import annotations

import base64
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from annotating import ANN, SCHEMA, ServerRig, tasks_of
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.errors import BadParams, ExternalServiceError, LabelStudioDown, LabelStudioRefused, WrongProject
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.label_config import label_config
from al_pipeline.integrations.label_studio.payloads import data_key
from al_pipeline.integrations.label_studio.projects import ProjectMark
from al_pipeline.integrations.label_studio.transport import asked_to_wait
from al_pipeline.integrations.oracle import Oracle, ProjectRef, ProjectSpec
from al_pipeline.params import Schema

TOKEN = "0123456789abcdef0123456789abcdef01234567"
REF = ProjectRef(1, "p")
SECRET = "a text that nobody may read"


def schema(labels: list[str], fields: list[str] | None = None, question: str = "Which?") -> Schema:
    return Schema(version=1, question=question, labels=labels, fields=fields or ["text"])


Handler = Callable[[httpx.Request], httpx.Response]


def oracle_over(handler: Handler) -> LabelStudioOracle:
    """An oracle whose requests `handler` answers."""
    transport = httpx.MockTransport(handler)
    return LabelStudioOracle("http://ls.example", TOKEN, timeout=1, sleep=lambda _: None, transport=transport)


# The label config ------------------------------------------------------------------------------------


def test_the_config_is_exactly_this() -> None:
    assert label_config(schema(["ham", "spam"], question='Is "this" <spam> & ham?')) == (
        '<View><Header value="Is &quot;this&quot; &lt;spam&gt; &amp; ham?" /><Text name="text" value="$text" />'
        '<Choices name="label" toName="text" choice="single" showInLine="true" required="true">'
        '<Choice value="ham" hotkey="1" /><Choice value="spam" hotkey="2" /></Choices></View>'
    )


def test_several_fields_are_shown_each_with_its_name() -> None:
    root = ElementTree.fromstring(label_config(schema(["a", "b"], ["text", "Subject line", "label"])))
    shown = [(e.tag, e.get("value")) for e in root if e.tag in ("Header", "Text")]
    assert shown == [
        ("Header", "Which?"),
        ("Header", "text"),
        ("Text", "$text"),
        ("Header", "Subject line"),
        ("Text", f"${data_key('Subject line')}"),
        ("Header", "label"),
        ("Text", f"${data_key('label')}"),
    ]
    assert root.find("Choices").get("toName") == "text"  # type: ignore[union-attr]


def test_hotkeys_are_digits_then_letters_then_none() -> None:
    root = ElementTree.fromstring(label_config(schema([f"class {n}" for n in range(40)])))
    keys = [choice.get("hotkey") for choice in root.iter("Choice")]
    assert keys[:11] == [*"1234567890", "a"]
    assert keys[32:] == ["z", *[None] * 7]
    assert len({key for key in keys if key}) == 33
    assert not {"h", "r", "u"} & set(keys), "the editor has them for itself"


@pytest.mark.parametrize("bad", [schema(["$5", "more"]), schema(["a", "b"], question="Is it $text?")])
def test_a_dollar_is_refused_since_it_would_show_a_field(bad: Schema) -> None:
    with pytest.raises(BadParams, match=r"\$"):
        label_config(bad)


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$"), min_size=1, max_size=20)


@settings(max_examples=100, derandomize=True)
@given(words, st.lists(words.map(str.strip).filter(bool), min_size=2, max_size=5, unique_by=str.casefold))
def test_whatever_the_names_hold_they_come_out_of_the_config_as_they_went_in(question: str, labels: list[str]) -> None:
    root = ElementTree.fromstring(label_config(schema(labels, question=question)))
    assert root.find("Header").get("value") == question  # type: ignore[union-attr]
    assert [choice.get("value") for choice in root.iter("Choice")] == labels
    assert {element.tag for element in root.iter()} == {"View", "Header", "Text", "Choices", "Choice"}


# Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "token"), [("ls.example", TOKEN), ("http://x", ""), ("http://x", "tökén"), ("http://x", "a b")]
)
def test_an_address_or_token_that_cannot_be_right_is_refused_at_once(url: str, token: str) -> None:
    with pytest.raises(LabelStudioRefused):
        LabelStudioOracle(url, token)


def calls(oracle: Oracle) -> dict[str, Callable[[], Any]]:
    """Every call of the interface."""
    return {
        "ensure_project": lambda: oracle.ensure_project(ProjectSpec("w", "c", SCHEMA)),
        "ensure_known": lambda: oracle.ensure_project(ProjectSpec("w", "c", SCHEMA), REF),
        "check": lambda: oracle.check(REF, "w"),
        "adopt": lambda: oracle.adopt(REF, "w", "c"),
        "task_states": lambda: list(oracle.task_states(REF, 1)),
        "import_tasks": lambda: oracle.import_tasks(REF, tasks_of("w", 1, 2)),
        "changed": lambda: oracle.changed(REF, "2026-01-01T00:00:00.000000Z"),
        "answered": lambda: list(oracle.answered(REF, None)),
        "answered_by_key": lambda: list(oracle.answered_by_key(REF, ["k"])),
        "answered_after": lambda: list(oracle.answered_after(REF, 0, "2026-01-01T00:00:00.000000Z", 9)),
        "totals": lambda: oracle.totals(REF, "2026-01-01T00:00:00.000000Z"),
        "accounts": lambda: oracle.accounts(),
        "retire": lambda: oracle.retire(REF, [1]),
        "open_tasks": lambda: list(oracle.open_tasks(REF)),
    }


NAMES = list(calls(None))  # type: ignore[arg-type]
REPLIES: dict[str, tuple[int, bytes, type[ExternalServiceError]]] = {
    "unauthorized": (401, b'{"detail": "%s"}', LabelStudioRefused),
    "forbidden": (403, b'{"detail": "%s"}', LabelStudioRefused),
    "invalid": (400, b'{"detail": "%s"}', LabelStudioRefused),
    "conflict": (409, b"%s", LabelStudioRefused),
    "redirect": (302, b"%s", LabelStudioDown),
    "busy": (429, b"%s", LabelStudioDown),
    "broken": (500, b"<html>%s</html>", LabelStudioDown),
    "portal": (200, b"<html>%s</html>", LabelStudioDown),
    "empty": (200, b"", LabelStudioDown),
    "list": (200, b'["%s"]', LabelStudioDown),
    "text": (200, b'"%s"', LabelStudioDown),
    "null": (200, b"null", LabelStudioDown),
    "number": (200, b"17", LabelStudioDown),
    "deep": (200, b"[" * 100_000, LabelStudioDown),
}


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("name", NAMES)
def test_any_unusable_reply_is_our_error_and_tells_no_secret(
    name: str, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, body, expected = REPLIES[reply]
    headers = {"Set-Cookie": f"sessionid={SECRET}", "Content-Type": "application/json"}
    text = body.replace(b"%s", SECRET.encode())
    caplog.set_level(logging.DEBUG)
    with (
        oracle_over(lambda _: httpx.Response(status, content=text, headers=headers)) as oracle,
        pytest.raises(expected) as caught,
    ):
        calls(oracle)[name]()
    told = "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value)) + caplog.text
    assert SECRET not in told and TOKEN not in told
    assert "http://ls.example" in told or "Label Studio" in told


PAGE = b"<html><h1>Not Found</h1></html>"
ELSEWHERE: dict[str, tuple[int, bytes, dict[str, str], str]] = {
    "a page is missing": (404, PAGE, {}, "there is no Label Studio at http://ls.example (404); is the address right?"),
    "another service": (404, b'{"detail": "Not Found"}', {}, "there is no Label Studio at http://ls.example (404)"),
    "a proxy's password": (401, PAGE, {}, "a server in front of Label Studio at http://ls.example asks for a password"),
    "a proxy's ban": (403, b"denied", {}, "a server in front of Label Studio"),
    "https": (301, b"", {"Location": "https://ls.example/api"}, "redirects to https://ls.example (301); if that is"),
    "another host": (302, b"", {"Location": "https://sso.example/login?next=/"}, "redirects to https://sso.example"),
    "a log-in": (
        302,
        b"",
        {"Location": "/user/login?next=/api"},
        "redirects to another page (302), such as",
    ),
    "a secret target": (302, b"", {"Location": f"https://u:{SECRET}@x.example/"}, "redirects to another page (302)"),
    "a page": (200, PAGE, {}, "answered 200, but not as Label Studio does"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_an_address_at_which_something_else_answers_is_named_so(case: str) -> None:
    status, body, headers, says = ELSEWHERE[case]
    kind = "application/json" if body.startswith(b"{") else "text/html"
    reply = partial(httpx.Response, status, content=body, headers={"Content-Type": kind, **headers})
    with oracle_over(lambda _: reply()) as oracle, pytest.raises(ExternalServiceError) as caught:
        oracle.about()
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not type(caught.value).__name__.startswith("_") and SECRET not in str(caught.value)
    with (
        oracle_over(lambda _: reply()) as oracle,
        pytest.raises(ExternalServiceError),
    ):  # no WrongProject: who knows of it?
        oracle.check(REF, "w")
    with oracle_over(lambda _: reply()) as oracle, pytest.raises(ExternalServiceError):
        oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))


@contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port at which something takes connections and says this, or is silent (None)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def serve() -> None:
            server.settimeout(0.1)
            kept = []
            while not stop.is_set():
                with suppress(TimeoutError, OSError):
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()
            for connection in kept:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def why_not(url: str, timeout: float = 5.0) -> str:
    with (
        LabelStudioOracle(url, TOKEN, timeout, sleep=lambda _: None) as oracle,
        pytest.raises(ExternalServiceError) as caught,
    ):
        oracle.about()
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_connection_that_comes_to_nothing_says_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    assert "no server answers at http" in why_not(f"http://127.0.0.1:{closed}")
    assert "is it running?" in why_not(f"http://127.0.0.1:{closed}")
    assert "the host of http://no-such-host.invalid was not found" in why_not("http://no-such-host.invalid")
    with listening(b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        assert "no usable reply from http" in why_not(f"http://127.0.0.1:{port}")
    with listening(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as port:
        assert "does not use TLS; should it be http://?" in why_not(f"https://127.0.0.1:{port}")
    with listening(None) as port:
        assert "gave no reply in time" in why_not(f"http://127.0.0.1:{port}", timeout=0.2)
    with listening(b"") as port:
        assert "is it running, and is it Label Studio?" in why_not(f"http://127.0.0.1:{port}")


def test_a_certificate_that_nobody_knows_is_named(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=other.example",
        "-days",
        "1",
        "-keyout",
    ]
    subprocess.run([*make, str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = plain.accept()
                    with suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        told = why_not(f"https://127.0.0.1:{plain.getsockname()[1]}")
        plain.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert "this machine does not trust the certificate" in told and "SSL_CERT_FILE" in told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.ReadError])
def test_no_reply_is_our_error(name: str, error: type[httpx.TransportError]) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error(SECRET, request=request)

    with oracle_over(fail) as oracle, pytest.raises(LabelStudioDown) as caught:
        calls(oracle)[name]()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_only_reads_are_repeated_and_not_for_ever() -> None:
    seen: list[str] = []

    def down(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(503)

    with oracle_over(down) as oracle:
        for name in ("check", "import_tasks", "retire"):
            with pytest.raises(LabelStudioDown):
                calls(oracle)[name]()
    assert seen == ["GET"] * 4 + ["POST"] + ["PATCH"]


PROJECT = {
    "id": 1, "title": "al w", "description": str(ProjectMark("w", "c", "p")), "label_config": label_config(SCHEMA),
    "maximum_annotations": 1, "show_collab_predictions": False, "parsed_label_config": {},
}  # fmt: skip


def personal_token(expires: float | None, **claims: Any) -> str:
    """A token as Label Studio makes them for a person: a JSON Web Token."""
    parts = ({"alg": "HS256"}, {**claims, **({} if expires is None else {"exp": expires})}, {})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)


def small_server(seen: list[tuple[str, str, str]], access: Callable[[], Any]) -> httpx.MockTransport:
    """A server with one project and no tasks, below /ls, which changes personal tokens for what `access` gives."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        seen.append((request.method, path, request.headers.get("authorization", "")))
        if path == "/ls/api/token/refresh/":
            return httpx.Response(200, json=access())
        return httpx.Response(200, json={"/ls/api/projects/1/": PROJECT, "/ls/api/users/": []}.get(path, {"tasks": []}))

    return httpx.MockTransport(answer)


def idle(oracle: LabelStudioOracle) -> None:
    """What a tick asks that finds nothing to do."""
    oracle.ensure_project(ProjectSpec("w", "c", SCHEMA), REF)
    assert [*oracle.open_tasks(REF), *oracle.task_states(REF, 0), *oracle.answered(REF, None)] == []


def test_a_personal_token_buys_one_short_lived_token_for_many_requests() -> None:
    bought = personal_token(time.time() + 300, token_type="access")
    seen: list[tuple[str, str, str]] = []
    transport = small_server(seen, lambda: {"access": bought})
    token = personal_token(time.time() + 9999, token_type="refresh")
    with LabelStudioOracle("http://ls.example/ls", token, transport=transport) as oracle:
        idle(oracle)
    assert [path for _, path, _ in seen].count("/ls/api/token/refresh/") == 1
    assert {sent for method, _, sent in seen if method == "GET"} == {f"Bearer {bought}"}


def test_a_short_lived_token_that_ended_is_bought_anew() -> None:
    ends = iter([time.time() - 1, time.time() + 300])
    seen: list[tuple[str, str, str]] = []
    transport = small_server(seen, lambda: {"access": personal_token(next(ends))})
    token = personal_token(time.time() + 9999)
    with LabelStudioOracle("http://ls.example/ls", token, transport=transport) as oracle:
        idle(oracle)
    assert [path for _, path, _ in seen].count("/ls/api/token/refresh/") == 2


@pytest.mark.parametrize("expires", [1.0, None])
def test_a_personal_token_that_ended_is_refused_before_it_is_sent(expires: float | None) -> None:
    seen: list[tuple[str, str, str]] = []
    token = personal_token(expires)
    transport = small_server(seen, dict)
    with (
        LabelStudioOracle("http://ls.example/ls", token, transport=transport) as oracle,
        pytest.raises(LabelStudioRefused, match="refused the token") as caught,
    ):
        idle(oracle)
    assert seen == [] and token not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("reply", [{}, [], {"access": 5}, {"access": "two\nlines"}])
def test_a_reply_without_a_short_lived_token_is_no_answer(reply: Any) -> None:
    seen: list[tuple[str, str, str]] = []
    transport = small_server(seen, lambda: reply)
    with (
        LabelStudioOracle(
            "http://ls.example/ls", personal_token(time.time() + 99), sleep=lambda _: None, transport=transport
        ) as oracle,
        pytest.raises(LabelStudioDown, match="sent an unexpected reply"),
    ):
        idle(oracle)


def test_certificates_are_checked_wherever_there_are_any() -> None:
    def verifies(url: str) -> bool:
        with LabelStudioOracle(url, TOKEN) as oracle:
            context = oracle._transport.http._transport._pool._ssl_context  # type: ignore[attr-defined]
        return bool(context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname)

    assert verifies("https://ls.example/ls") and not verifies("http://127.0.0.1:1")


def test_waiting_needs_no_import_of_the_sdk() -> None:
    code = (
        "import sys, httpx, test_label_studio as t\n"
        "assert 'label_studio_sdk' not in sys.modules\n"
        "with t.LabelStudioOracle('http://ls.example/ls', t.TOKEN, transport=t.small_server([], dict)) as oracle:\n"
        "    t.idle(oracle)\n"
        "assert 'label_studio_sdk' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def busy_oracle(waits: list[str], slept: list[float], seen: list[str]) -> LabelStudioOracle:
    """An oracle of a server that asks to wait as `waits` says, one after another, and then answers 404."""

    def busy(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(429, headers={"Retry-After": waits.pop(0)}) if waits else httpx.Response(404)

    transport = httpx.MockTransport(busy)
    return LabelStudioOracle("http://ls.example", TOKEN, timeout=1, sleep=slept.append, transport=transport)


def test_a_server_that_asks_us_to_wait_is_not_asked_earlier_whatever_the_request() -> None:
    slept: list[float] = []
    seen: list[str] = []
    with busy_oracle(["7", "8"], slept, seen) as oracle:
        with pytest.raises(LabelStudioDown, match=r"asks us to wait for 7 s \(status 429\)"):
            oracle.import_tasks(REF, tasks_of("w", 1, 1))
        assert slept == [], "a write is not repeated"
        with pytest.raises(LabelStudioRefused, match="there is no Label Studio"):
            oracle.check(REF, "w")
    assert seen == ["POST", "GET", "GET", "GET"]
    asked = [seconds for seconds in slept if seconds > 1]
    assert asked == [pytest.approx(7, abs=0.5), pytest.approx(8, abs=0.5)]


@pytest.mark.parametrize(
    ("waits", "told"),
    [(["3600"], "3600 s"), (["40", "40"], "40 s"), (["9" * 20], "more than a day"), (["9" * 400], "more than a day")],
)
def test_a_server_that_asks_us_to_wait_for_long_is_left_alone(waits: list[str], told: str) -> None:
    slept: list[float] = []
    seen: list[str] = []
    requests = len(waits)
    with busy_oracle(waits, slept, seen) as oracle:
        for _ in range(2):
            with pytest.raises(LabelStudioDown, match=f"asks us to wait for {told} .* try again later"):
                oracle.check(REF, "w")
    assert len(seen) == requests, "nothing more was sent"
    assert sum(slept) <= 60 + 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "12"}, 12.0),
        ({"Retry-After": " 12 "}, 12.0),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:30 GMT", "date": "Tue, 24 Nov 2026 10:00:00 GMT"}, 30.0),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:30 -0000", "date": "Tue, 24 Nov 2026 10:00:00 GMT"}, 30.0),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:00 GMT", "date": "Tue, 24 Nov 2026 10:00:30 GMT"}, 0.0),
        ({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT", "date": "soon"}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "1.5"}, 0.0),
        ({"retry-after": "²"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({}, 0.0),
    ],
)
def test_retry_after_is_read_in_both_of_its_forms(headers: dict[str, str], seconds: float) -> None:
    assert asked_to_wait(headers) == seconds


def test_a_read_that_is_refused_is_not_repeated() -> None:
    seen: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        return httpx.Response(401)

    with oracle_over(refuse) as oracle, pytest.raises(LabelStudioRefused, match="Copy a new one"):
        oracle.check(REF, "w")
    assert seen == ["GET"]


def test_a_listing_that_goes_round_in_circles_ends() -> None:
    counts = {"is_labeled": False, "total_annotations": 0, "cancelled_annotations": 0}
    page = [{"id": n, "data": {}, **counts} for n in range(1, 501)]
    with (
        oracle_over(lambda _: httpx.Response(200, json={"tasks": page})) as oracle,
        pytest.raises(LabelStudioDown, match="out of order"),
    ):
        list(oracle.task_states(REF))


def test_a_partial_import_is_no_success() -> None:
    with (
        oracle_over(lambda _: httpx.Response(201, json={"task_count": 1})) as oracle,
        pytest.raises(LabelStudioDown, match="1 of 2"),
    ):
        oracle.import_tasks(REF, tasks_of("w", 1, 2))


def test_what_is_sent_is_exactly_this() -> None:
    sent: list[Any] = []

    def take(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, str(request.url), request.headers["Authorization"], json.loads(request.content)))
        return httpx.Response(201, json={"task_count": 1})

    with oracle_over(take) as oracle:
        oracle.import_tasks(REF, tasks_of("w0rkspace", 7, 1))
    data = {
        "text": "text of item-0",
        "item_id": "item-0",
        "al_round": 7,
        "al_part": "pool",
        "al_rank": 0,
        "al_score": 0.5,
        "push_key": "w0rkspace:0007:item-0",
        "shown_hash": "38a8fdcf493bd3c8ac4abd39e4286f3333cb1020494076e5b820315b4023fd90",
    }
    url = "http://ls.example/api/projects/1/import?return_task_ids=true"
    assert sent == [("POST", url, f"Token {TOKEN}", [{"data": data}])]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "tasks", "data", "annotations", "result", "completed_by", "updated_at", "email"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(json_values)
def test_a_reply_of_any_shape_is_read_or_refused(value: Any) -> None:
    replies = [json.dumps(shape) for shape in (value, {"tasks": [value]}, {"tasks": value})]
    ANY_SHAPE.extend(replies)
    for _ in replies:
        for name in ("task_states", "answered_by_key", "answered", "totals", "accounts", "check", "ensure_project"):
            try:
                calls(ODD_SERVER)[name]()
            except (ExternalServiceError, WrongProject):
                continue
        ANY_SHAPE.pop()


ANY_SHAPE: list[str] = []
ODD_SERVER = oracle_over(lambda _: httpx.Response(200, text=ANY_SHAPE[-1]))


# A real server ---------------------------------------------------------------------------------------


@pytest.fixture
def oracle(label_studio: Any) -> Iterator[LabelStudioOracle]:
    with LabelStudioOracle(label_studio.url, label_studio.token) as made:
        yield made


@pytest.mark.server
def test_the_server_tells_its_version_and_who_we_are(oracle: LabelStudioOracle) -> None:
    about = oracle.about()
    assert about.version.startswith("1.")
    assert "@" in about.user
    assert about.clock_ahead is not None and abs(about.clock_ahead) < 60


@pytest.mark.server
def test_a_wrong_token_is_refused_with_what_to_do(label_studio: Any) -> None:
    with (
        LabelStudioOracle(label_studio.url, TOKEN) as stranger,
        pytest.raises(LabelStudioRefused, match="refused the token") as caught,
    ):
        stranger.about()
    assert TOKEN not in str(caught.value)


@pytest.mark.server
def test_our_settings_are_the_projects_and_stay_untouched_when_nothing_changed(
    oracle: LabelStudioOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = oracle.ensure_project(ProjectSpec(uuid.uuid4().hex[:12], "c", SCHEMA, 2, True))
    project = oracle._client.projects.get(ref.project_id)
    assert project.sampling == "Sequential sampling"
    assert project.skip_queue == "REQUEUE_FOR_OTHERS"
    assert (project.maximum_annotations, project.show_collab_predictions, project.enable_empty_annotation) == (
        2,
        True,
        False,
    )
    mark = ProjectMark(str(project.title).removeprefix("al "), "c", ref.project_uid)
    assert project.description == str(mark)
    monkeypatch.setattr(oracle._client.projects, "update", lambda *_, **__: pytest.fail("nothing to change"))
    assert oracle.ensure_project(ProjectSpec(mark.workspace_id, "c", SCHEMA, 2, True), ref) == ref


@pytest.mark.server
def test_strange_names_survive_the_server(oracle: LabelStudioOracle) -> None:
    odd = schema(
        ["<b>ham</b> & 'eggs'", 'say "spam"', "ünï, 日本 😀"], ["text", "Subject: line[0]"], "1 < 2 & 'so' \"on\"?"
    )
    workspace = uuid.uuid4().hex[:12]
    ref = oracle.ensure_project(ProjectSpec(workspace, "c", odd))
    asked = oracle._client.projects.get(ref.project_id).parsed_label_config
    assert asked["label"]["labels"] == odd.labels
    assert oracle.ensure_project(ProjectSpec(workspace, "c", odd), ref) == ref


@pytest.mark.server
def test_pages_are_joined_without_loss(oracle: LabelStudioOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("al_pipeline.integrations.label_studio.client._PAGE", 3)
    monkeypatch.setattr("al_pipeline.integrations.label_studio.client._KEYS_PER_REQUEST", 4)
    workspace = uuid.uuid4().hex[:12]
    ref = oracle.ensure_project(ProjectSpec(workspace, "c", SCHEMA))
    tasks = tasks_of(workspace, 1, 9)
    oracle.import_tasks(ref, tasks)
    keys = [task.plan.push_key for task in tasks]
    assert [state.push_key for state in oracle.task_states(ref)] == keys
    assert [task.push_key for task in oracle.answered(ref, None)] == keys
    assert [task.push_key for task in oracle.answered_by_key(ref, keys)] == keys


@pytest.mark.server
def test_a_guess_is_stored_where_there_is_one(oracle: LabelStudioOracle) -> None:
    workspace = uuid.uuid4().hex[:12]
    ref = oracle.ensure_project(ProjectSpec(workspace, "c", SCHEMA))
    plain, guessed = tasks_of(workspace, 1, 2)
    oracle.import_tasks(ref, [plain, replace(guessed, guess=("spam", 0.75))])
    tasks = [oracle._client.tasks.get(str(state.task_id)) for state in oracle.task_states(ref)]
    assert [len(task.predictions or []) for task in tasks] == [0, 1]
    assert tasks[1].predictions[0].result[0]["value"]["choices"] == ["spam"]


@pytest.mark.server
def test_an_invited_annotator_is_known_by_address(oracle: LabelStudioOracle, label_studio: Any) -> None:
    workspace = uuid.uuid4().hex[:12]
    ref = oracle.ensure_project(ProjectSpec(workspace, "c", SCHEMA))
    (task,) = tasks_of(workspace, 1, 1)
    oracle.import_tasks(ref, [task])
    with ServerRig(label_studio, oracle) as people:
        people.answer(ref, task.plan.push_key, ANN, "ham")
    (answered,) = oracle.answered(ref, None)
    assert [annotation.annotator for annotation in answered.annotations] == [ANN]


@pytest.mark.server
@pytest.mark.parametrize("fault", ["drop_after", "502_after", "truncate", "html_200", "wrong_json", "502_before"])
def test_a_read_comes_through_a_bad_network_and_gives_up_on_a_dead_one(label_studio: Any, fault: Any) -> None:
    with (
        FaultProxy(label_studio.url) as proxy,
        LabelStudioOracle(proxy.url, label_studio.token, sleep=lambda _: None) as through,
    ):
        proxy.strike(fault, times=3, method="GET", path="/api/version")
        assert through.about().version.startswith("1.")
        proxy.strike(fault, times=9, method="GET", path="/api/version")
        with pytest.raises(LabelStudioDown):
            through.about()
