"""The page of `al live` over real HTTP and in a real browser, `al watch`, and the artifact in Prefect."""

from __future__ import annotations

import http.client
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browser import Browser
from harness import Played, change_params, go_on
from msgspec.structs import replace

from al_pipeline.cli.live import _Shown
from al_pipeline.data.pool import fetch
from al_pipeline.errors import UsageError
from al_pipeline.live import page as pages
from al_pipeline.live.page import address_of, page_of, serve_page, token_of, usual_port
from al_pipeline.live.plan import running
from al_pipeline.live.state import (
    RUNNING,
    TEST,
    ClassState,
    CurvePoint,
    Interval,
    LiveState,
    PersonState,
    QueueEntry,
    StopProposal,
    read_state,
    write_state,
)
from al_pipeline.live.watch import figures, for_prefect, standing, tables
from al_pipeline.operations import live_artifact
from al_pipeline.operations.live import Live
from al_pipeline.operations.live_artifact import LiveArtifact
from al_pipeline.operations.live_state import LiveStates, labels_per_hour
from al_pipeline.records import Event
from al_pipeline.workspace.workspace import open_workspace

TOKEN = "t" * 43
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e]]>"


def state(labels: int = 120, **changed: object) -> LiveState:
    points = [CurvePoint(40, 0.7, 0.6, 0.8, TEST, 0), CurvePoint(80, 0.8, 0.7, 0.88, TEST, 1)]
    points += [CurvePoint(number, 0.75 + number / 1000, 0.6, 0.9, RUNNING, 2) for number in (90, 100, labels)]
    made = LiveState(
        time=time.time(), started=time.time() - 60, pid=1, workspace="spam", health="up", waits_for="answers", round=2,
        round_size=40, settled=7, labels=labels, test_labels=30, labels_per_hour=240.0,
        running=Interval(0.87, 0.8, 0.92, 55), curve=tuple(points),
        classes=(ClassState("ham", 70, 500, 0.2), ClassState(HOSTILE, 50, 500, 0.6)),
        people=(PersonState(f"ann{HOSTILE}@example.org", 7, 3.0, True), PersonState("bob@example.org", 1, 900, False)),
        stop=StopProposal(0.95, False, "the model still changes"),
        queue=(QueueEntry("mail-1", "chosen", "m" * 16, 119, 0.93, 4.0, f"win {HOSTILE}", "ham", 0.52),),
        model="m" * 16, model_labels=120, stale=0, label_studio_page="http://127.0.0.1:8080/projects/1/data",
    )  # fmt: skip
    return replace(made, **changed)


class Shown:
    """What the page's source returns."""

    def __init__(self) -> None:
        self.state: LiveState | None = state()
        self.healthy = True


@pytest.fixture
def served() -> Iterator[tuple[Shown, str]]:
    shown = Shown()
    with serve_page(lambda: shown.state, 0, TOKEN, lambda: shown.healthy) as url:
        yield shown, address_of(url, TOKEN)


def ask(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port or 0, timeout=10)
    connection.request(method, path, headers=headers)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def test_only_who_has_the_token_and_the_address_may_read(served: tuple[Shown, str]) -> None:
    shown, url = served
    port, query = urlsplit(url).port, f"?token={TOKEN}"
    for path in ("/", "/state", "/events"):
        assert ask(url, path)[0] == ask(url, f"{path}?token=wrong")[0] == ask(url, f"{path}?token=%ff")[0] == 403
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}.evil.example", ""):
            assert ask(url, path + query, Host=host)[0] == 421, host
    status, headers, body = ask(url, f"/{query}", Host=f"localhost:{port}")
    assert status == 200 and TOKEN.encode() not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "unsafe" not in str(headers)
    assert headers["Referrer-Policy"] == "no-referrer" and "Access-Control-Allow-Origin" not in headers
    assert json.loads(ask(url, f"/state{query}")[2])["labels"] == 120
    assert ask(url, "/page.js")[0] == ask(url, "/page.css")[0] == 200
    assert ask(url, f"/../page.py{query}")[0] == ask(url, f"/nothing{query}")[0] == 404
    assert ask(url, f"/wake{query}", "POST")[0] == 501, "it only shows"
    assert ask(url, "/health")[0] == 200 and ask(url, "/health", Host="evil.example")[0] == 421
    shown.healthy = False
    assert ask(url, "/health")[0] == 503


def test_a_stream_sends_each_new_state_and_signs_of_life(
    served: tuple[Shown, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "EVENT_SECONDS", 0.05)
    monkeypatch.setattr(pages, "BEAT_SECONDS", 0.2)
    shown, url = served
    with httpx.stream("GET", url.replace("/?", "/events?"), timeout=10, trust_env=False) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        lines = reply.iter_lines()
        assert next(lines) == "retry: 2000" and next(lines) == ""
        first = next(lines)
        assert json.loads(first.removeprefix("data: "))["labels"] == 120
        assert next(line for line in lines if line) == ": beat", "an unchanged state is not sent again"
        shown.state = state(121)
        second = next(line for line in lines if line.startswith("data"))
        assert json.loads(second.removeprefix("data: "))["labels"] == 121


def test_streams_are_bounded_and_end_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_STREAMS", 2)
    monkeypatch.setattr(pages, "EVENT_SECONDS", 0.05)
    with ExitStack() as stack:
        with serve_page(state, 0, TOKEN) as url:
            events = f"{url}/events?token={TOKEN}"
            open_ = [
                stack.enter_context(httpx.stream("GET", events, timeout=10, trust_env=False)).iter_lines()
                for _ in range(2)
            ]
            assert [next(lines) for lines in open_] == ["retry: 2000"] * 2
            assert httpx.get(events, trust_env=False).status_code == 503
        for lines in open_:
            assert list(lines)[-1] == "", "the stream ends"


def test_the_address_stays_the_same(once: Played, tmp_path: Path) -> None:
    workspace = go_on(once, tmp_path)[0]
    token = token_of(workspace)
    assert token == token_of(workspace) and (workspace.home / "live/token").stat().st_mode & 0o777 == 0o600
    assert usual_port(workspace.layout) == 0
    with serve_page(state, None, token) as url:
        write_state(workspace.layout, state(page=url))
        port = urlsplit(url).port
        assert usual_port(workspace.layout) == port and page_of(workspace) is None
        with running(workspace.layout):
            assert page_of(workspace) == f"{url}/?token={token}"
        with pytest.raises(UsageError, match=f"port {port} cannot be used"), serve_page(state, port, token):
            pass
        with serve_page(state, None, token, usual=port or 0) as other:
            assert other != url, "its port is taken"
    with serve_page(state, None, token, usual=port or 0) as again:
        assert again == url


@pytest.mark.browser
def test_a_person_reads_the_page(chromium: Path, served: tuple[Shown, str], tmp_path: Path) -> None:
    shown, url = served
    with Browser(tmp_path / "browser") as browser:
        browser.goto(url)
        browser.find("//td[contains(., 'ham, 52.0')]")
        text = browser.text
        for said in ("87.0 %", "80.0 % to 92.0 %", "240", "7 of 40 answered", "Go on", "connected", "bob@example.org"):
            assert said in text, said
        assert "<script>document.title" in text and "onerror" in text, "hostile texts are shown as texts"
        assert browser.script("return document.title") == "spam: 120 labels, live"
        assert browser.script("return document.querySelectorAll('main img, main script').length") == 0
        # A screen reader: landmarks, headings, names, a table for the plot, a live region that is not flooded.
        found = browser.script(
            "const all = (s) => [...document.querySelectorAll(s)];"
            "return {landmarks: all('header, main').length, unnamed: all('section, [role=region]').filter((one) =>"
            "  !document.getElementById(one.getAttribute('aria-labelledby'))).length,"
            "  plot: all('svg[role=img][aria-labelledby]').length, points: all('#points tbody tr').length,"
            "  scopes: all('th:not([scope])').length, live: all('[aria-live=polite]').length,"
            "  lang: document.documentElement.lang, drawn: all('#curve polyline').length,"
            "  spoken: document.getElementById('spoken').textContent}"
        )
        assert found.pop("spoken").startswith("Round 2: 7 of 40 answered, 120 labels")
        assert found == {
            "landmarks": 2, "unnamed": 0, "plot": 1, "points": 5, "scopes": 0, "live": 1, "lang": "en", "drawn": 2,
        }  # fmt: skip
        # It follows, without a word to a screen reader each second; it can be paused by the keyboard.
        shown.state = state(150, stop=StopProposal(0.995, True, "further labels change little"))
        browser.find("//p[@id='stop'][starts-with(., 'You may stop')]")
        assert browser.script("return document.getElementById('spoken').textContent").startswith("Round 2: 7")
        assert "120" in browser.script("return document.getElementById('spoken').textContent")
        assert browser.script("document.getElementById('pause').focus(); return document.activeElement.id") == "pause"
        browser.fill("//button[@id='pause']", "\ue007")
        browser.find("//button[@aria-pressed='true']")
        shown.state = state(151)
        browser.find("//span[@id='connection'][.='paused']")
        browser.fill("//button[@id='pause']", "\ue007")
        shown.state = state(152)
        deadline = time.monotonic() + 20
        while browser.script("return document.title") != "spam: 152 labels, live":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Nothing was refused by the page's own policy, and nothing was asked elsewhere.
        asked = browser.script("return performance.getEntriesByType('resource').map((one) => new URL(one.name).host)")
        assert set(asked) == {urlsplit(url).netloc}
        browser.goto(url.replace(TOKEN, "wrong"))
        assert "lacks its token" in browser.text


@pytest.mark.browser
def test_a_page_finds_the_next_process(chromium: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "browser") as browser:
        with serve_page(state, 0, TOKEN) as url:
            browser.goto(address_of(url, TOKEN))
            browser.find("//span[@id='connection'][.='connected']")
        browser.find("//span[@id='connection'][.='not connected']")
        with serve_page(lambda: state(130), urlsplit(url).port, TOKEN):
            browser.find("//span[@id='connection'][.='connected']")
            browser.find("//dd[starts-with(., '130')]")


def test_the_state_says_what_is_asked_and_how_good_it_is(once: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(once, tmp_path)
    change_params(workspace, {"enabled: false": "enabled: true"})
    live, states, now = Live(open_workspace(workspace.layout.root), lambda: oracle), LiveStates(), time.time
    assert states.now(live).round is None, "before the first step"
    live.step()
    for _ in range(6):
        key = oracle.queue("ann@example.org")[0]
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
        live.step()
        shown = states.now(live, "http://page")
        items = fetch([workspace.layout.pool, workspace.layout.test], [one.item_id for one in shown.queue])
        assert [one.text for one in shown.queue] == [items[one.item_id].text for one in shown.queue]
    assert shown.health == "up" and shown.round == 1 and shown.people[0].name == "ann@example.org"
    assert live.round is not None
    assert shown.labels_per_hour == labels_per_hour(live.round.events, shown.time) > 0
    assert [point.what for point in shown.curve][0] == TEST
    grown = [point for point in shown.curve if point.what == RUNNING and point.round == 1]
    assert shown.running is not None and len(grown) == shown.running.answers > 0, "a point for each random answer"
    assert (grown[-1].value, grown[-1].low) == (shown.running.value, shown.running.low)
    assert shown.time <= now()
    told = _Shown(live, prints=False)
    assert told.newest() is None
    told.write()
    assert told.newest() is told.newest() and read_state(workspace.layout) == told.newest()
    live.ticking = True
    during = told.newest()
    assert during is not None and during.health == "a tick runs" and during is told.newest(), "sent once"
    live.close()


def test_labels_per_hour_are_those_of_the_last_minutes() -> None:
    def at(seconds: float) -> Event:
        when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))
        return Event(str(seconds), "label", "a", "h", "pool", 1, "w:0001:a#1", "ann", "ham", observed_at=when)

    now = 1_800_000_000.0
    assert labels_per_hour([], now) == 0
    assert labels_per_hour([at(now - 120 + n) for n in range(10)], now) == pytest.approx(300)
    assert labels_per_hour([at(now - 5000), *(at(now - 500 + n) for n in range(10))], now) == pytest.approx(60)
    assert labels_per_hour([at(now - 5000)], now) == 0


# Terminal and Prefect -------------------------------------------------------------------------------------------------


def watch(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "al_pipeline.cli.app", "-C", str(root), "watch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})


def test_watch_shows_the_same_in_a_terminal(once: Played, tmp_path: Path) -> None:
    workspace = go_on(once, tmp_path)[0]
    root, layout = workspace.layout.root, workspace.layout
    ended = watch(root, "--once")
    assert ended.returncode == 3 and "has not run in this workspace" in ended.stderr
    layout.live.mkdir(mode=0o700, exist_ok=True)
    write_state(layout, state(page="http://127.0.0.1:1"))
    ended = watch(root, "--once")
    assert ended.returncode == 0 and "does not run; this is what it showed" in ended.stderr
    assert "token" not in ended.stdout, "nothing listens there"
    for said in ("running accuracy: 87.0 % (80.0 % to 92.0 %), from 55 random answers", "240", "Unsure of", "bob@"):
        assert said in ended.stdout, said
    assert "\u202e" not in ended.stdout
    found = json.loads(watch(root, "--once", "--json").stdout)
    assert found["runs"] is False and found["queue"][0]["predicted"] == "ham"
    with running(layout):
        found = json.loads(watch(root, "--once", "--json").stdout)
        assert found["runs"] is True and found["standing"].startswith("up, updated")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "al_pipeline.cli.app", "-C", str(root), "watch", "--json"],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process.stdout:
            assert json.loads(process.stdout.readline())["labels"] == 120
            write_state(layout, state(121))
            assert json.loads(process.stdout.readline())["labels"] == 121
            process.terminate()
            process.wait(20)


def test_watch_follows_in_a_terminal(once: Played, tmp_path: Path) -> None:
    layout = go_on(once, tmp_path)[0].layout
    layout.live.mkdir(mode=0o700, exist_ok=True)
    write_state(layout, state(120))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 110))
    command = [sys.executable, "-P", "-m", "al_pipeline.cli.app", "-C", str(layout.root), "watch"]
    with running(layout), subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen, deadline = "", time.monotonic() + 30
        for labels in ("120", "121"):
            write_state(layout, state(int(labels)))
            while f"{labels}, and 30 of the test set" not in seen:
                assert time.monotonic() < deadline, seen
                seen += os.read(ours, 65536).decode("utf-8", "replace")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    os.close(ours)
    assert "1 of 2 who answered" in seen and "Unsure of" in seen and "\u202e" not in seen


def test_how_the_state_stands() -> None:
    now = time.time()
    assert standing(state(), now, True).startswith("up")
    assert "nothing new for 10 min" in standing(state(time=now - 600), now, True)
    assert standing(state(health="Label Studio is down"), now, True) == "Label Studio is down"
    assert dict(figures(state()))["stop"] == "not yet: the model still changes"
    empty = state(running=None, curve=(), classes=(), people=(), queue=(), round=None)
    assert tables(empty) == [] and dict(figures(empty))["round"] == "none open"


def test_prefect_gets_the_state_without_texts_and_never_holds_up(
    once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = go_on(once, tmp_path)[0]
    rows = json.dumps(for_prefect(state()))
    assert "87.0 %" in rows and "win " not in rows and "mail-1" in rows
    sent: list[tuple[str, str | None]] = []
    broken = threading.Event()

    def write(_: object, server: object, key: str, rows: object, description: str, artifact: str | None) -> str:
        if not broken.is_set():
            broken.set()
            raise ValueError("no such server")
        sent.append((key, artifact))
        return "artifact"

    monkeypatch.setattr(live_artifact, "_server", lambda _: object())
    monkeypatch.setattr(live_artifact, "write_table", write)
    monkeypatch.setattr(live_artifact, "MOST_SECONDS", 0.01)
    shown = LiveArtifact(workspace, 0.01)
    with shown.running():
        deadline = time.monotonic() + 10
        while len(sent) < 2 and time.monotonic() < deadline:
            shown.offer(state())
            time.sleep(0.02)
    assert broken.is_set() and sent[:2] == [(f"live-{workspace.id}", None), (f"live-{workspace.id}", "artifact")]
    assert not shown._thread.is_alive()


def test_a_state_of_an_older_version_is_read(once: Played, tmp_path: Path) -> None:
    layout = go_on(once, tmp_path)[0].layout
    layout.live.mkdir(mode=0o700, exist_ok=True)
    write_state(layout, state())
    path = layout.live / "state.json"
    row = json.loads(path.read_text("utf-8"))
    for entry in row["queue"]:
        for name in ("text", "predicted", "confidence"):
            del entry[name]
    path.write_text(json.dumps(row), "utf-8")
    found = read_state(layout)
    assert found is not None and found.queue[0].text == "" and found.labels == 120
