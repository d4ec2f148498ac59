"""What people are told: which messages, once each, by real receivers; and that no service can fail a tick."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import stat
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from aiosmtpd.smtp import SMTP
from harness import Played, answer_all, go_on
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from al_pipeline import errors
from al_pipeline.cli.app import app
from al_pipeline.errors import AlError, LabelStudioDown, Locked, ManualActionRequired, NothingToDo, UnexpectedChange
from al_pipeline.integrations import notification_services
from al_pipeline.integrations.notification_services import send
from al_pipeline.notifications import outbox as boxes
from al_pipeline.notifications.messages import (
    FAILURES,
    NO_ANSWER,
    PROBLEMS,
    Message,
    budget_nearly_spent,
    gold_accuracy_fell,
    held,
    needs_person,
    problem_of,
)
from al_pipeline.notifications.outbox import TRIES, Outbox
from al_pipeline.notifications.silence import silent_annotators
from al_pipeline.operations import notify
from al_pipeline.operations.checks.services import check_notifications
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.params import Occasion, parse_params
from al_pipeline.records import Event
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
SECRET = "t0ken-9f8e7d6c"
NOW = datetime(2026, 6, 30, 12, tzinfo=UTC)


# Receivers -----------------------------------------------------------------------------------------------------------


class Hook:
    """A webhook: what it was sent, and how it answers."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        self.pause = 0.0
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.got.append({**body, "path": self.path})
                time.sleep(hook.pause)
                self.send_response(hook.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"json://127.0.0.1:{self.server.server_address[1]}/{SECRET}"

    @property
    def titles(self) -> list[str]:
        return [str(one["title"]).partition(": ")[2] for one in self.got]


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def mailbox() -> Iterator[Any]:
    """A real SMTP server that takes mail for everybody."""
    got: list[Any] = []

    class Handler:
        async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
            got.append(message_from_bytes(envelope.content, policy=policy.default))
            return "250 OK"

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: SMTP(Handler(), loop=loop), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    port = server.sockets[0].getsockname()[1]
    yield SimpleNamespace(got=got, url=f"mailto://127.0.0.1:{port}?from=al@example.org&to=ann@example.org")
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def message(key: str = "k", title: str = "Round 3 is full", body: str = "36 of 40 <tasks> & more") -> Message:
    return Message(key, "round_full", title, body)


def test_services_get_messages_and_say_what_they_answered_without_a_secret(mailbox: Any, hook: Hook) -> None:
    refusing, slow, gone = Hook(), Hook(), Hook()
    refusing.status, slow.pause = 403, 60.0
    gone.server.shutdown()
    gone.server.server_close()
    services = {
        "1": mailbox.url,
        "2": hook.url,
        "3": refusing.url,
        "4": f"{slow.url}?rto=100",
        "5": f"nonsense://{SECRET}",
        "6": gone.url,
    }
    begin = time.monotonic()
    found = {one.service: one for one in send(services, {name: [message()] for name in services}, seconds=8)}
    assert time.monotonic() - begin < 20
    assert [found[name].delivered for name in services] == [True, True, False, False, False, False]
    assert (found["1"].kind, found["2"].kind, found["5"].kind) == ("E-Mail", "JSON", None)
    assert "403" in found["3"].answer and "refused" in found["6"].answer
    assert found["4"].answer == NO_ANSWER and not found["4"].known
    assert not any(SECRET in one.answer or "127.0.0.1" in one.answer for one in found.values())
    assert [(one["title"], one["message"]) for one in hook.got] == [("Round 3 is full", "36 of 40 <tasks> & more")]
    (mail,) = mailbox.got
    assert mail["subject"] == "Round 3 is full" and mail["to"] == "ann@example.org"
    assert "36 of 40 <tasks> & more" in mail.get_body(("plain",)).get_content()
    assert len(refusing.got) == 2, "a quick refusal is tried once more"
    for one in (refusing, slow):
        one.server.shutdown()
        one.server.server_close()


# What is told --------------------------------------------------------------------------------------------------------


def kinds(of: type[AlError]) -> Iterator[type[AlError]]:
    yield of
    for one in of.__subclasses__():
        yield from kinds(one)


def test_each_problem_has_a_sentence_of_its_own() -> None:
    """And none is shadowed by a wider class above it. Texts of errors, which may name anything, are not sent."""
    for place, (kind, _) in enumerate(PROBLEMS):
        assert not any(issubclass(kind, above) for above, _ in PROBLEMS[:place]), kind
    known = {kind for kind, _ in PROBLEMS}
    assert set(kinds(ManualActionRequired)) <= known, "a new error needs a sentence"
    for kind in kinds(errors.AlError):
        found = needs_person(kind(f"{SECRET} /home/x: a text of the pool"), FAILURES)
        assert (found is None) == issubclass(kind, Locked | NothingToDo)
        assert found is None or (SECRET not in found.body and kind.__name__ in found.body)
    assert "bug" in problem_of(ZeroDivisionError())


def test_a_service_has_three_ticks_to_come_back() -> None:
    assert [needs_person(LabelStudioDown("x"), n) is None for n in range(1, 5)] == [True, True, False, False]
    assert needs_person(UnexpectedChange("x"), 1) is not None


def test_the_folders_name_adds_no_line_to_a_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(Layout(tmp_path / "mails\nBcc: eve@example.org\udcff"), "0123456789ab")
    sent: list[str] = []
    monkeypatch.setenv("AL_NOTIFY_URLS", "json://127.0.0.1:9")
    monkeypatch.setattr(
        notification_services, "send", lambda _, messages: sent.extend(m.title for m in messages["AL_NOTIFY_URLS:1"])
    )
    notify.test_services(workspace)
    assert sent == ["mails Bcc: eve@example.org: a test of al-pipeline"]


def test_messages_are_one_line_each() -> None:
    found = [
        held(3, "held", ["looks worse\nthan\x1b[31m tolerated", "x" * 5000]),
        gold_accuracy_fell("ann@example.org", 12, 20, 0.78, 0.8),
        budget_nearly_spent("money", "€ 920", "€ 1,000", 0.92),
        budget_nearly_spent("labels", "1,000", "1,000", 1.0),
    ]
    assert all(one.title.isprintable() and one.body.isprintable() and len(one.body) <= 1000 for one in found)
    assert {one.event for one in found} <= set(get_args(Occasion))
    assert len({one.key for one in found}) == 4


def test_parameters_of_notifications() -> None:
    params = parse_params(TEMPLATE)
    assert set(params.notify.events) == set(get_args(Occasion))
    section = TEMPLATE[TEMPLATE.index("notify:") : TEMPLATE.index("annotators: []")]
    assert parse_params(TEMPLATE.replace(section, "")).notify.events == [], "an older workspace tells nothing"
    for wrong in ("[published, nonsense]", "published", "[3]"):
        with pytest.raises(errors.BadParams, match="notify.events"):
            parse_params(TEMPLATE.replace("[round_full, published, held", f"{wrong} #"))
    with pytest.raises(errors.BadParams, match="silent_days"):
        parse_params(TEMPLATE.replace("silent_days: 5 ", "silent_days: 0 "))


def answer(who: str, task: str, at: str | None, number: int = 3, kind: Any = "label") -> Event:
    label = "ham" if kind == "label" else None
    return Event(f"{who}{task}{at}", kind, task, "c", "pool", number, f"{task}#1", who, label, updated_at=at)


def silent(events: list[Event], allowed: tuple[str, ...] = (), opened_days: float = 20, days: float = 5) -> list[str]:
    found = silent_annotators(events, ["a", "b"], allowed, NOW - timedelta(opened_days), NOW, days, 3)
    return [one.key.split(":")[1] for one in found]


def test_who_is_silent() -> None:
    stamp = [(NOW - timedelta(days)).isoformat() for days in range(30)]
    assert silent([answer("ann", "a", stamp[6]), answer("bob", "a", stamp[4])]) == ["ann"]
    assert silent([answer("ann", "a", stamp[29]), answer("ann", "b", stamp[28])]) == [], "nothing waits for her"
    assert silent([answer("ann", "a", stamp[29])], opened_days=4) == [], "the round has just opened"
    assert silent([answer("gone", "z", stamp[29], number=1)]) == [], "left rounds ago"
    assert silent([answer("bob", "a", stamp[1])], allowed=("Never@Example.org", "bob")) == ["never@example.org"]
    assert silent([answer("ann", "z", stamp[6], kind="skip")]) == ["ann"]
    assert silent([answer("import", "a", stamp[9])]) == []


def test_times_of_answers_that_are_no_times() -> None:
    """A stamp of the future counts as now, an unreadable one not at all, and one of years before as it says."""
    assert silent([answer("ann", "a", "2999-01-01T00:00:00+00:00")]) == []
    assert silent([answer("ann", "a", "yesterday")]) == ["ann"]
    assert silent([answer("ann", "a", None)]) == ["ann"]
    assert silent([answer("ann", "a", "0001-01-01T00:00:00")]) == ["ann"]


# Once each -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["killed before", "killed after", "silent", "refused", "delivered"]), max_size=12))
def test_a_message_arrives_and_at_most_once_more(course: list[str]) -> None:
    """`killed after`: the service has it, and the process dies before that is noted."""
    box = boxes.with_messages(Outbox(), [message()])
    arrived = refused = 0
    for happens in [*course, *["delivered"] * 10]:
        todo = boxes.to_send(box, ["1"])
        if not todo:
            break
        box = boxes.begun(box, todo)
        arrived += happens in ("killed after", "silent", "delivered")
        refused += happens == "refused"
        if happens in ("refused", "delivered"):
            box = boxes.answered(box, {("1", "k"): happens == "delivered"})
        box = boxes.settled(box, ["1"])
    assert boxes.settled(box, ["1"]).waiting == ()
    assert arrived <= 2 and refused <= TRIES
    lost = course.count("killed before") >= 2
    assert arrived or lost or refused == TRIES
    assert "k" in boxes.settled(box, ["1"]).told
    assert boxes.with_messages(boxes.settled(box, ["1"]), [message()]).waiting == ()


def test_an_outbox_is_bounded_and_read_again() -> None:
    box = boxes.with_messages(Outbox(), [message(str(n)) for n in range(500)])
    assert len(box.waiting) == boxes.MOST_WAITING
    assert [one.key for one in boxes.to_send(box, ["1"])["1"]] == ["400", "401", "402", "403"]
    for n in range(30):
        box = boxes.with_messages(box, [message(f"{n}-{i}") for i in range(100)])
        box = boxes.settled(box, [])
    assert len(box.told) == boxes.KEPT and not box.waiting
    assert boxes.parse(msgspec.json.encode(box).decode()) == box
    with pytest.raises(ValueError):
        boxes.parse("{}x")
    told = Outbox(told=("gold_accuracy_fell:ann", "gold_accuracy_fell:bob", "published:1"))
    assert boxes.only_present(told, "gold_", {"gold_accuracy_fell:bob"}).told == told.told[1:]
    assert boxes.without(boxes.with_messages(box, [message("needs_person:X")]), "needs_person:").waiting == ()


# Whole ticks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(started: Played, tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workspace whose people are told by a webhook, and a tick of it."""
    workspace, oracle, truth = go_on(started, tmp_path)
    monkeypatch.setenv("AL_NOTIFY_URLS", hook.url)

    def run(days: float = 0) -> TickReport:
        """A tick, `days` from now."""
        root = workspace.layout.root
        return tick(open_workspace(root), lambda: oracle, now=lambda: datetime.now(UTC) + timedelta(days))

    return SimpleNamespace(workspace=workspace, oracle=oracle, truth=truth, tick=run)


@pytest.mark.slow
def test_a_round_is_told_once_and_nothing_of_it_is_secret(told: Any, hook: Hook) -> None:
    assert told.tick().warnings == () and hook.got == []
    answer_all(told.oracle, told.truth)
    assert told.tick().published == (0,)
    assert hook.titles == ["Round 0 is full", "Round 0 is published"]
    assert hook.got[0]["title"].startswith("workspace: ") and "settled" in hook.got[0]["message"]
    told.tick()
    assert len(hook.got) == 2
    for _ in range(2):
        told.tick(days=6)
    assert hook.titles[2:] == ["ann@example.org has not answered for 6 days"]
    hook.got.pop()
    written = told.workspace.layout.outbox
    assert stat.S_IMODE(written.stat().st_mode) == 0o600 and SECRET not in written.read_text(encoding="utf-8")
    texts = json.dumps(hook.got)
    assert not any(word in texts for word in ("meeting agenda", "cheap pills", "mail-0"))
    change = told.workspace.layout.record(0)
    before = change.read_bytes()
    change.write_bytes(before + b"\n")
    for _ in range(2):
        with pytest.raises(UnexpectedChange):
            told.tick()
    change.write_bytes(before)
    assert hook.titles[2:] == ["A tick needs a person"]
    assert str(change) not in json.dumps(hook.got)
    told.tick()
    change.write_bytes(before + b"\n")
    with pytest.raises(UnexpectedChange):
        told.tick()
    change.write_bytes(before)
    assert hook.titles[2:] == ["A tick needs a person"] * 2, "it came back after it was solved"


@pytest.mark.slow
def test_a_failing_service_fails_no_tick(
    told: Any, hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refusals end after three ticks; a damaged outbox and a dying process of ours are warnings too."""
    hook.status = 500
    monkeypatch.setattr(notification_services, "PAUSE", 0.0)
    answer_all(told.oracle, told.truth)
    first = told.tick()
    assert first.published == (0,)
    assert any("notification service AL_NOTIFY_URLS:1 (JSON)" in one and "500" in one for one in first.warnings)
    for _ in range(TRIES):
        told.tick()
    assert all(hook.titles.count(title) <= 2 * TRIES for title in set(hook.titles))
    assert told.tick().warnings == () and notify.outbox_of(told.workspace).waiting == ()
    assert SECRET not in caplog.text
    told.workspace.layout.outbox.write_text("{", encoding="utf-8")
    (warning,) = told.tick().warnings
    assert "outbox.json is damaged" in warning


@pytest.mark.slow
def test_a_kill_between_sending_and_noting_repeats_a_message_once(
    told: Any, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException): ...

    def dies(*_: Any) -> Any:
        raise Died

    answer_all(told.oracle, told.truth)
    with monkeypatch.context() as patched:
        patched.setattr(notify.boxes, "answered", dies)
        for _ in range(4):
            with contextlib.suppress(Died):
                told.tick()
    told.tick()
    told.tick()
    assert hook.titles.count("Round 0 is full") == 2 and hook.titles.count("Round 0 is published") <= 2
    assert "Round 0 is published" in hook.titles


@pytest.mark.slow
def test_services_are_stored_outside_the_workspace(
    started: Played, tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, _ = go_on(started, tmp_path)
    monkeypatch.chdir(workspace.layout.root)

    def al(*words: str, given: str | None = None) -> Any:
        return CliRunner().invoke(app, ["notify", *words], input=given)

    assert al("test").exception.exit_code == NothingToDo.exit_code
    assert next(iter(check_notifications(workspace))).message.startswith("nobody is told")
    stored = al("add", "--json", given=f"{hook.url}\n")
    assert json.loads(stored.stdout) == {"service": "1", "kind": "JSON"}
    assert stat.S_IMODE(workspace.services_file.stat().st_mode) == 0o600
    assert not workspace.services_file.is_relative_to(workspace.layout.root)
    for wrong, what in ((f"nonsense://{SECRET}", "no service"), ("", "one line"), ("a b", "one line")):
        refused = al("add", given=f"{wrong}\n").exception
        assert what in str(refused) and SECRET not in str(refused)
    listed = al("list")
    assert "JSON" in listed.stdout and SECRET not in listed.stdout
    hook.status = 403
    tried = al("test", "--json")
    (row,) = json.loads(tried.stdout)["services"]
    assert tried.exit_code == 5 and not row["delivered"] and "403" in row["answer"]
    assert SECRET not in tried.stdout
    assert [one.message for one in check_notifications(workspace)][-1].startswith("told by JSON: ")
    assert al("remove", "2").exception.exit_code == 2
    assert al("remove", "1").exit_code == 0 and workspace.services() == {}
    monkeypatch.setenv("AL_NOTIFY_URLS", hook.url)
    assert "AL_NOTIFY_URLS" in str(al("add", given=f"{hook.url}\n").exception)
