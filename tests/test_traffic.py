"""The log of served requests: what is answered and logged survives; what cannot be logged is answered and counted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from harness import Played, go_on
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from test_serve import TOKEN, Fake, running

from al_pipeline.data.outputs import read_labeled
from al_pipeline.data.pool import count_items, iter_items
from al_pipeline.data.served import request_weights
from al_pipeline.errors import BadInput, BadParams, NothingToDo, UnexpectedChange
from al_pipeline.evaluation.figures import Decision
from al_pipeline.evaluation.online import weighted_accuracy, wilson
from al_pipeline.evaluation.promotion import both
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.ingestion.traffic import take_traffic, taken
from al_pipeline.operations.intervene import approve, dvc_for_intervention
from al_pipeline.operations.plugins import doubtful_plugins
from al_pipeline.operations.report import report_data
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, tick
from al_pipeline.operations.traffic import delete, show
from al_pipeline.params import NO_TRAFFIC, NOT_LOGGED, ServeLog, parse_params, recorded
from al_pipeline.records import Item
from al_pipeline.reporting.page import render
from al_pipeline.serving.log import RequestLog
from al_pipeline.serving.traffic_log import TrafficRecorder, open_recorder
from al_pipeline.traffic import journal as journal_module
from al_pipeline.traffic.choice import choose
from al_pipeline.traffic.journal import Journal
from al_pipeline.traffic.log import Redact, TrafficLog
from al_pipeline.traffic.rows import COLUMNS, LoggedRequest, from_batch, from_line, texts_of, to_line, to_table
from al_pipeline.traffic.store import TrafficStore
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import accept_contents
from al_pipeline.workspace.workspace import Workspace, open_workspace

ALL = replace(NOT_LOGGED, share=1.0)
DAY = 86_400_000_000
NOW = time.time_ns() // 1000


def request(number: int = 0, texts: tuple[str, ...] = ("x",), time: int = NOW, **changes: Any) -> LoggedRequest:
    """A request with the id `rNUMBER`."""
    made = LoggedRequest(
        time=time + number,
        request_id=f"r{number}",
        round=3,
        digest="ab",
        runtime="torch",
        propensity=0.5,
        classes=("ham", "spam"),
        texts=texts,
        places=tuple(range(len(texts))),
        proba=((0.25, 0.75),) * len(texts),
    )
    return replace(made, **changes)


def write(folder: Path, *requests: LoggedRequest, torn: bytes = b"") -> Path:
    """A journal whose writer has ended."""
    folder.mkdir(mode=0o700, exist_ok=True)
    made = Journal(folder)
    made.append(b"".join(map(to_line, requests)) + torn)
    made.end()
    return sorted(folder.glob("journal-*"), key=lambda path: path.stat().st_mtime_ns)[-1]


def ids(store: TrafficStore) -> list[str]:
    return sorted(row.request_id for row in store.rows())


@contextmanager
def logging(folder: Path, settings: ServeLog = ALL, redact: Redact | None = None, **options: Any) -> Iterator[Any]:
    made = TrafficLog(folder, settings, redact, **options)
    try:
        yield made
    finally:
        made.close()


# Files ---------------------------------------------------------------------------------------------------------------
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.floats(0, 1), min_size=2, max_size=4)),
        min_size=1,
        max_size=5,
    ).filter(lambda rows: len({len(proba) for _, proba in rows}) == 1)
)
def test_a_line_and_a_row_say_what_was_asked_and_answered(rows: list[tuple[str, list[float]]]) -> None:
    texts, proba = tuple(text for text, _ in rows), tuple(tuple(row) for _, row in rows)
    made = request(7, texts, classes=tuple("abcd"[: len(proba[0])]), proba=proba)
    line = to_line(made)
    assert line.count(b"\n") == 1 and from_line(line[:-1]) == made
    found = list(texts_of(made))
    table = to_table(found)
    assert tuple(table.column_names) == COLUMNS
    (batch,) = table.to_batches()
    assert list(from_batch(batch)) == found
    assert [row.probabilities[row.classes.index(row.label)] for row in found] == [max(row) for row in proba]


def test_a_journal_becomes_a_segment_once_its_writer_has_ended_and_no_row_is_lost_or_twice(tmp_path: Path) -> None:
    store = TrafficStore(tmp_path)
    living = Journal(tmp_path)
    living.append(to_line(request(0, ("a", "b"))))
    write(tmp_path, request(1), request(2), torn=to_line(request(3))[:-9])
    assert ids(store) == ["r0", "r0", "r1", "r2"], "a line that was cut off is none"
    assert store.convert() == 1 and len(store.journals()) == 1, "that of a living writer stays"
    assert ids(store) == ["r0", "r0", "r1", "r2"]
    living.append(to_line(request(4)))
    living.end()
    (path,) = store.journals()
    copy = path.read_bytes()
    assert store.convert() == 1 and not store.journals()
    path.write_bytes(copy)  # killed after the segment was written, before the journal was deleted
    assert ids(store) == ["r0", "r0", "r1", "r2", "r4"]
    assert store.convert() == 1 and len(store.segments()) == 2
    assert ids(store) == ["r0", "r0", "r1", "r2", "r4"]
    assert [row.request_id for row in store.rows(since=NOW, until=NOW + 2)] == ["r1", "r2"]
    held = store.held()
    assert (held.texts, held.first, held.last, held.segments, held.journals) == (5, NOW, NOW + 4, 2, 0)
    table = pq.read_table(store.segments()[0])
    assert str(table.schema.field("time").type) == "timestamp[us, tz=UTC]"
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


def test_damaged_lines_are_counted_and_a_damaged_segment_is_named(tmp_path: Path) -> None:
    store = TrafficStore(tmp_path)
    wrong = [b'{"time":1}', b"\xff", b"[" * 10_000, b"", to_line(request(0, proba=((1.0,),)))[:-1]]
    write(tmp_path, request(1), torn=b"\n".join([*wrong, b""]))
    assert ids(store) == ["r1"] and store.damaged == len(wrong) == store.held().damaged
    store.convert()
    assert ids(store) == ["r1"]
    store.segments()[0].write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="is damaged"):
        ids(store)


def test_what_is_old_or_too_much_is_deleted_the_oldest_first(tmp_path: Path) -> None:
    store, now = TrafficStore(tmp_path), 100 * DAY
    for day in (1, 50, 99):
        write(tmp_path, request(day, ("x" * 100,), time=day * DAY))
        store.convert()
    living = Journal(tmp_path)
    living.append(to_line(request(200, time=now)))
    assert store.retain(60, 10**9, now / 1e6) == 1 and ids(store) == ["r200", "r50", "r99"]
    sizes = [path.stat().st_size for path in store.segments()]
    assert store.retain(60, sizes[1] + 1000, now / 1e6) == 1 and ids(store) == ["r200", "r99"]
    write(tmp_path, request(300, time=now))
    assert store.retain(60, 0, now / 1e6) == 2 and ids(store) == ["r200"], "a journal in use stays"
    living.end()


def test_one_id_is_deleted_from_segments_and_from_the_journal_of_a_running_server(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    write(folder, request(1), request(2))
    store = TrafficStore(folder)
    store.convert()
    write(folder, request(1, ("a secret",)), request(3))
    with logging(folder) as made:
        asyncio.run(made.record(request(1, ("a secret", "another"))))
        asyncio.run(made.record(request(4)))
        done = store.delete("r1")
        assert (done.texts, done.waiting) == (4, 0)
        assert ids(store) == ["r2", "r3", "r4"] and store.deleting() == frozenset()
        assert store.delete("r1", 0.0).texts == 0
    assert ids(store) == ["r2", "r3", "r4"]
    hanging = Journal(folder)
    hanging.append(to_line(request(5)) + to_line(request(6)))
    assert store.delete("r5", 0.0).waiting == 1
    assert ids(store) == ["r2", "r3", "r4", "r6"], "nobody reads it any more"
    hanging.end()
    store.convert()
    assert not any("r5" in str(pq.read_table(path).to_pylist()) for path in store.segments())


# Writing -------------------------------------------------------------------------------------------------------------
def test_a_request_is_in_the_file_when_the_answer_may_go_and_files_are_private(tmp_path: Path) -> None:
    async def ask(made: TrafficLog) -> None:
        await asyncio.gather(*(made.record(request(number, ("x", "y"))) for number in range(50)))
        assert len(ids(TrafficStore(tmp_path / "log"))) == 100

    with logging(tmp_path / "log") as made:
        asyncio.run(ask(made))
        assert made.counts().logged == 100 and not any(made.counts().unlogged.values())
    store = TrafficStore(tmp_path / "log")
    assert not store.journals() and len(store.segments()) == 1, "the end makes a segment of it"
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    asyncio.run(made.record(request(99)))
    assert made.counts().unlogged["ended"] == 1


def test_a_full_disk_lets_answers_out_unlogged_and_tears_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    really, room = os.write, 100

    def write_some(handle: int, data: Any) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "no space left on device")
        written = really(handle, data[:room])
        room -= written
        return written

    with logging(tmp_path / "log", report=told.append) as made:
        monkeypatch.setattr(journal_module.os, "write", write_some)
        monkeypatch.setattr("al_pipeline.traffic.log._AGAIN", 0.2)
        begin = time.monotonic()
        for number in range(20):
            asyncio.run(made.record(request(number, ("x" * 90, "y"))))
        assert time.monotonic() - begin < 10 and made.counts().unlogged["disk"] == 40
        room = 10**9
        time.sleep(0.3)
        asyncio.run(made.record(request(20)))
        assert made.counts().logged == 1
    assert ids(TrafficStore(tmp_path / "log")) == ["r20"] and told[0] == {"disk": 40}


def test_a_disk_that_hangs_holds_answers_for_a_moment_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang, really = threading.Event(), os.write

    def write_late(handle: int, data: Any) -> int:
        hang.wait(20)
        return really(handle, data)

    async def ask(made: TrafficLog) -> None:
        first = [asyncio.ensure_future(made.record(request(number))) for number in range(10)]
        await asyncio.gather(*first)
        begin = time.monotonic()
        await asyncio.gather(*(made.record(request(number)) for number in range(10, 500)))
        assert time.monotonic() - begin < 2, "nobody waits any more"

    with logging(tmp_path / "log", patience=2) as made:
        monkeypatch.setattr(journal_module.os, "write", write_late)
        asyncio.run(ask(made))
        hang.set()
        time.sleep(0.2)
        asyncio.run(made.record(request(1000)))
        found = made.counts()
    assert found.logged + found.unlogged["behind"] == 501
    assert len(ids(TrafficStore(tmp_path / "log"))) == found.logged, "what is counted as logged is there"


def test_a_redaction_comes_before_anything_is_written(tmp_path: Path) -> None:
    def redact(text: str) -> str | None:
        if text == "boom":
            raise ValueError(f"{text} is secret")
        return None if text == "withhold" else text.replace("secret", "***")

    with logging(tmp_path / "log", redact=redact) as made:
        asyncio.run(made.record(request(0, ("a secret", "withhold", "plain"))))
        asyncio.run(made.record(request(1, ("boom", "plain"))))
        asyncio.run(made.record(request(2, ("\ud800",))))
        asyncio.run(made.record(request(3, ("withhold",))))
        found = made.counts()
    rows = list(TrafficStore(tmp_path / "log").rows())
    assert [(row.text, row.place, row.redacted) for row in rows] == [("a ***", 0, True), ("plain", 2, False)]
    assert found.logged == 2
    assert {reason: count for reason, count in found.unlogged.items() if count} == {
        "withheld": 2,
        "redaction": 2,
        "text": 1,
    }


_KILLED = """
import asyncio, os, random, signal, sys, time
from pathlib import Path

import al_pipeline.data.parquet, pyarrow.parquet

from al_pipeline.params import NOT_LOGGED
from al_pipeline.traffic import log
from al_pipeline.traffic.rows import LoggedRequest
from msgspec.structs import replace

log._POLL_SECONDS, log._TIDY_SECONDS = 0.005, 0.01
folder, kills, settings = Path(sys.argv[1]), int(sys.argv[2]), replace(NOT_LOGGED, share=1.0, days=36_500.0)


async def serve(server):
    made = log.TrafficLog(folder, settings)

    async def ask(client):
        for number in range(100_000):
            name = f"{server}-{client}-{number}"
            await made.record(
                LoggedRequest(
                    time=time.time_ns() // 1000, request_id=name, round=0, digest="d", runtime="torch", propensity=1.0,
                    classes=("a", "b"), texts=(name,) * 2, places=(0, 1), proba=((0.1, 0.9),) * 2,
                )
            )
            os.write(1, f"{name}\\n".encode())

    await asyncio.gather(*map(ask, range(4)))


draw = random.Random(1)
for server in range(kills):
    child = os.fork()
    if not child:
        asyncio.run(serve(server))
    time.sleep(draw.uniform(0.03, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
"""Servers' logs in processes that are killed while they write, and while they turn older journals into segments."""


def test_what_was_answered_is_kept_once_whenever_servers_are_killed(tmp_path: Path) -> None:
    kills = 36
    with (tmp_path / "answered").open("wb") as answered:
        subprocess.run(
            [sys.executable, "-c", _KILLED, str(tmp_path / "log"), str(kills)], stdout=answered, check=True, timeout=120
        )
    names = (tmp_path / "answered").read_text("utf-8").split()
    assert len({name.split("-")[0] for name in names}) > kills // 2, "servers were killed before they answered"
    store = TrafficStore(tmp_path / "log")
    assert store.segments(), "no journal of a killed server was turned into a segment by a later one"
    for _ in range(2):
        rows = Counter((row.request_id, row.place) for row in store.rows())
        lost = {name for name in names if not (rows[name, 0] and rows[name, 1])}
        assert not lost and store.damaged == 0
        assert set(rows.values()) == {1}
        store.convert()
    assert not store.journals()


# The server ----------------------------------------------------------------------------------------------------------
def test_the_server_logs_a_random_share_and_says_what_it_did_not(tmp_path: Path) -> None:
    settings = replace(ALL, share=0.3)
    with logging(tmp_path / "log", settings) as made:
        recorder = TrafficRecorder(made)
        with running(Fake(), recorder=recorder, kept=recorder.counts) as server, server.client() as client:
            for number in range(120):
                found = client.post("/predict", json={"text": "x"}, headers={"X-Request-Id": f"r{number}"})
                assert found.status_code == 200
            metrics = client.get("/metrics").text
    rows = list(TrafficStore(tmp_path / "log").rows())
    assert 12 < len(rows) < 70 and {row.propensity for row in rows} == {0.3}
    assert f'al_serve_log_texts_total{{outcome="logged"}} {float(len(rows))}' in metrics
    assert 'al_serve_log_texts_total{outcome="disk"} 0.0' in metrics
    assert {(row.round, row.digest, row.label, row.probabilities) for row in rows} == {
        (0, "digest-0", "b", (0.01, 0.99))
    }


@pytest.fixture(scope="module")
def played(twice: Played, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, SimulatedOracle]:
    """Two published rounds."""
    made, oracle, _ = go_on(twice, tmp_path_factory.mktemp("traffic"))
    return made, oracle


@pytest.fixture(scope="module")
def workspace(played: tuple[Workspace, SimulatedOracle]) -> Workspace:
    """The second of two published rounds is promoted; all requests are logged."""
    made, _ = played
    with dvc_for_intervention(made) as dvc:
        approve(made, dvc, 1, "a test")
    path = made.layout.params
    path.write_text(path.read_text("utf-8").replace("    share: 0.0", "    share: 1.0"), "utf-8")
    return open_workspace(made.layout.root)


@pytest.mark.slow
def test_a_killed_server_loses_no_request_that_it_answered(workspace: Workspace) -> None:
    root = str(workspace.layout.root)
    command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", root, "serve", "--port", "0", "--json"]
    environment = {**os.environ, "AL_SERVE_TOKEN": TOKEN}
    answered: list[str] = []

    def ask(url: str, who: int) -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
            for number in range(10_000):
                name = f"{who}-{number}"
                try:
                    found = client.post("/predict", json={"texts": [name] * 3}, headers={"X-Request-Id": name})
                except httpx.HTTPError:
                    return
                assert found.status_code == 200
                answered.append(name)

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            said = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            threads = [threading.Thread(target=ask, args=(said["url"], who)) for who in range(6)]
            for thread in threads:
                thread.start()
            until = time.monotonic() + 30
            while len(answered) < 150 and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            for thread in threads:
                thread.join(30)
        finally:
            process.kill()
    store = TrafficStore(workspace.layout.traffic)
    assert len(answered) >= 150
    (path,) = store.journals()
    for _ in range(2):
        rows = ids(store)
        assert set(answered) <= set(rows), "answered and not logged"
        assert len(rows) == 3 * len(set(rows)) <= 3 * (len(answered) + 6)
        store.convert()
    assert not path.exists() and stat.S_IMODE(workspace.layout.traffic.stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_redaction_runs_only_once_it_is_trusted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_SERVE_TOKEN", TOKEN)
    layout = workspace.layout
    before = layout.params.read_text("utf-8")
    layout.plugins.mkdir(exist_ok=True)
    (layout.plugins / "mine.py").write_text("import os\ndef redact(text): return str('AL_SERVE_TOKEN' in os.environ)\n")
    layout.params.write_text(before.replace('redact: ""', "redact: plugins.mine:redact"), "utf-8")
    made = open_workspace(layout.root)
    with pytest.raises(UnexpectedChange, match=r"serve.log.redact 'plugins.mine:redact' runs code .* `al trust`"):
        open_recorder(made, RequestLog())
    (doubt,) = doubtful_plugins(made)
    accept_contents([doubt.claim])
    recorder = open_recorder(made, RequestLog())
    assert recorder is not None
    asyncio.run(recorder._traffic.record(request(1_000)))
    recorder.close()
    assert [row.text for row in TrafficStore(layout.traffic).rows() if row.request_id == "r1000"] == ["False"], (
        "it sees no secret"
    )
    layout.params.write_text(before, "utf-8")


def test_parameters_of_the_log_that_make_no_sense() -> None:
    text = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
    assert parse_params(text).serve.log == NOT_LOGGED, "off by default"
    for old, new, says in (
        ("share: 0.0", "share: 2", "serve.log.share"),
        ('redact: ""', "redact: mine.py", "serve.log.redact: .*plugins.NAME:function"),
        ("max_mb: 1000", "max_mb: 1", "serve.log.max_mb"),
    ):
        with pytest.raises(BadParams, match=says):
            parse_params(text.replace(f"    {old}", f"    {new}"))


def test_no_round_depends_on_what_is_kept_and_taken() -> None:
    text = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values["serve"]["log"] |= {"share": 1.0, "redact": "plugins.mine:redact"}
    values["traffic"] = {"random": 5, "uncertain": 5, "test": 5}
    on = parse_params(yaml.safe_dump(values))
    del values["serve"]["log"], values["traffic"]
    older = parse_params(yaml.safe_dump(values))
    assert recorded(on) == recorded(older) == recorded(parse_params(text))
    assert older.serve.log == NOT_LOGGED and older.traffic == NO_TRAFFIC == parse_params(text).traffic
    stages = (Path(__file__).parents[1] / "dvc.yaml").read_text(encoding="utf-8")
    assert "serve" not in stages and "traffic" not in stages


# Into the pool -------------------------------------------------------------------------------------------------------
def asked(*texts: str, propensity: float = 1.0, margins: float = 0.5, number: int = 0) -> list[tuple[bytes, Any]]:
    proba = ((0.5 + margins / 2, 0.5 - margins / 2),)
    rows = (request(number, (text,), propensity=propensity, proba=proba) for text in texts)
    return [(sha256(row.text.encode()).digest(), row) for one in rows for row in texts_of(one)]


def test_what_is_drawn_at_random_estimates_how_often_texts_are_asked_without_bias() -> None:
    random, told, drawn = Random(7), {f"t{number}": number % 5 + 1 for number in range(60)}, Counter[str]()
    estimates = []
    for trial in range(400):
        logged = [text for text, times in told.items() for _ in range(times) if random.random() < 0.5]
        chosen = choose(asked(*random.sample(logged, len(logged)), propensity=0.5), 10, 0, f"{trial}")
        assert len(chosen) == 10 == len({one.row.text for one in chosen})
        drawn.update(one.row.text for one in chosen)
        estimates.append(sum(one.times / one.propensity for one in chosen if one.propensity))
    assert abs(sum(estimates) / 400 - sum(told.values())) < 6, "180 requests; the standard error is about 2"
    assert len(drawn) == 60, "each can be drawn"


def test_the_least_sure_are_chosen_beside_the_random_ones_whatever_the_order() -> None:
    rows = [row for number in range(50) for row in asked(f"t{number}", margins=number / 50, number=number)]
    rows += asked("t3", "t3", margins=0.06, number=60)
    chosen = choose(rows, 5, 4, "a seed")
    sampled = {one.row.text for one in chosen if one.policy == "random"}
    unsure = [one for one in chosen if one.policy == "uncertain"]
    left = [f"t{number}" for number in range(50) if f"t{number}" not in sampled]
    assert [one.row.text for one in unsure] == left[:4] and len(sampled) == 5
    assert all(one.propensity is None for one in unsure)
    assert {one.row.text: one.times for one in unsure}.get("t3", 3) == 3
    again = choose(rows[::-1], 5, 4, "a seed")
    assert {(one.row.text, one.policy, one.times) for one in again} == {
        (one.row.text, one.policy, one.times) for one in chosen
    }
    assert choose(rows, 0, 0, "a seed") == [] == choose([], 5, 5, "a seed")
    assert [one.propensity for one in choose(asked("x", "x", "y", propensity=0.25), 9, 0, "")] == [0.25, 0.25]


@pytest.fixture
def taking(workspace: Workspace) -> Iterator[Workspace]:
    """The workspace with an empty log, of which each tick takes two random and one uncertain text."""
    shutil.rmtree(workspace.layout.traffic, ignore_errors=True)
    before = workspace.layout.params.read_text("utf-8")
    text = before.replace("  random: 0 ", "  random: 2 ").replace("  uncertain: 0 ", "  uncertain: 1 ")
    workspace.layout.params.write_text(text, "utf-8")
    yield open_workspace(workspace.layout.root)
    workspace.layout.params.write_text(before, "utf-8")


def new_items(workspace: Workspace) -> dict[str, Any]:
    """The items of requests in the inbox, by text."""
    items = [item for batch in iter_items([workspace.layout.inbox_pool]) for item in batch]
    found = {item.text: json.loads(item.metadata) for item in items}
    return {text: columns["traffic"] for text, columns in found.items() if columns.get("source") == "traffic"}


@pytest.mark.slow
def test_each_tick_takes_new_texts_into_the_pool_up_to_its_cap(
    taking: Workspace, played: tuple[Workspace, SimulatedOracle]
) -> None:
    layout, now = taking.layout, time.time()
    (known, *_), *_ = iter_items([layout.pool])
    texts = (known.text, f" {known.text} ", *(f"a request {number}" for number in range(20)), "", "x" * 200_001)
    write(layout.traffic, request(1, texts, time=int(now * 1e6) - 60_000_000, propensity=0.5))
    unsure = request(2, ("who knows",), proba=((0.5, 0.5),), time=int(now * 1e6) - 50_000_000, propensity=1.0)
    write(layout.traffic, unsure, request(3, time=int(now * 1e6) + 1_000_000))
    report = tick(taking, lambda: played[1])
    assert report.changed and not report.warnings
    first = new_items(taking)
    assert Counter(one["policy"] for one in first.values()) == {"random": 2, "uncertain": 1}
    assert len(first) == 3 and not {"", known.text} & first.keys()
    for one in first.values():
        if one["policy"] == "random":
            assert one["propensity"] == pytest.approx((0.5 if one["request_id"] == "r1" else 1) * 2 / 21)
    if "who knows" in first:
        assert first["who knows"]["request_id"] == "r2"
    assert not TrafficStore(layout.traffic).journals(), "those of ended servers become segments"
    assert take_traffic(taking, now + 1) == (0, []), "each text is considered once"
    assert take_traffic(taking, now + 60)[0] == 1 and "x" in new_items(taking)
    assert taken(layout) == {"random": 3, "uncertain": 1, "test": 0, "novel": 0}
    assert show(taking)["texts"] == len(texts) + 2


@pytest.mark.slow
def test_a_tick_that_is_killed_while_it_takes_texts_in_takes_the_same_ones_later(
    taking: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, now = taking.layout, time.time()
    write(layout.traffic, request(77, tuple(f"killed {n}" for n in range(9)), time=int(now * 1e6) - 60_000_000))
    with monkeypatch.context() as patch:
        patch.setattr("al_pipeline.operations.ingest.commit", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        added, (said,) = take_traffic(taking, now)
    assert added == 0 and "killed" in said
    (path,) = layout.traffic.glob("taking-*")
    chosen = {json.loads(line)["text"] for line in path.read_text().splitlines()}
    assert take_traffic(taking, now + 1)[0] == 3 and chosen <= new_items(taking).keys()
    assert not list(layout.traffic.glob("taking-*"))
    deleted = delete(taking, "r77", 0.0)
    assert deleted.texts == 9 and len(deleted.items) == 3
    with pytest.raises(NothingToDo, match="no request 'r9'"):
        delete(taking, "r9", 0.0)


@pytest.mark.slow
def test_a_damaged_log_stops_no_tick(taking: Workspace) -> None:
    write(taking.layout.traffic, request(1))
    store = TrafficStore(taking.layout.traffic)
    store.convert()
    store.segments()[0].write_bytes(b"not Parquet")
    added, (said,) = take_traffic(taking, time.time() + 10)
    assert added == 0 and "is damaged" in said


# The second test set --------------------------------------------------------------------------------------------------
def test_those_of_the_test_set_are_drawn_first_and_all_are_a_random_sample() -> None:
    rows = [row for number in range(20) for row in asked(f"t{number}", number=number)]
    found = Counter[tuple[str, str]]()
    for trial in range(600):
        chosen = choose(rows, 4, 2, f"{trial}", test=3)
        assert Counter(one.policy for one in chosen) == {"test": 3, "random": 4, "uncertain": 2}
        assert {one.policy: one.propensity for one in chosen} == {"test": 0.15, "random": 0.2, "uncertain": None}
        found.update((one.row.text, one.policy) for one in chosen)
    for text in (f"t{number}" for number in range(20)):
        assert abs(found[text, "test"] - 90) < 45 and abs(found[text, "random"] - 120) < 50
    assert [one.policy for one in choose(rows[:2], 4, 2, "", test=3)] == ["test", "test"]


def test_the_accuracy_over_requests_counts_texts_as_often_as_they_are_asked() -> None:
    found = weighted_accuracy([True, False, True], [6.0, 2.0, 2.0], 0.95)
    assert found.value == pytest.approx(0.8) and found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx(wilson(0.8 * 100 / 44, 100 / 44, 0.95))
    same = weighted_accuracy([True, True, False, True], [3.0] * 4, 0.9)
    assert (same.value, same.low, same.high) == (0.75, *wilson(3, 4, 0.9))
    assert weighted_accuracy([], [], 0.95).value is None
    items = [
        Item(
            "a",
            "",
            "x",
            json.dumps({"source": "traffic", "traffic": {"policy": "test", "times": 3, "propensity": 0.5}}),
        ),
        Item("b", "", "x", json.dumps({"source": "traffic", "traffic": {"policy": "test", "times": "?"}})),
        Item("c", "", "x", json.dumps({"source": "traffic", "traffic": {"policy": "random", "times": 3}})),
        Item("d", "", "x", json.dumps({"source": "traffic", "traffic": "test"})),
        Item("e", "", "x"),
    ]
    assert request_weights(items) == {"a": 6.0, "b": 1.0}


def test_where_both_test_sets_have_to_allow_it_the_stricter_decision_counts() -> None:
    promoted = Decision(verdict="promoted", provisional=True, reasons=("better",), difference=0.1)
    held = Decision(verdict="held", provisional=False, reasons=("too few",))
    refused = Decision(verdict="refused", provisional=False, reasons=("worse",))
    assert both(promoted, held, "on requests").verdict == both(held, promoted, "").verdict == "held"
    assert both(refused, held, "").verdict == both(promoted, refused, "").verdict == "refused"
    found = both(promoted, promoted, "on requests")
    assert (found.verdict, found.provisional, found.difference) == ("promoted", True, 0.1)
    assert both(promoted, held, "on requests").reasons == ("better", "on requests: too few")
    assert not both(promoted, held, "").provisional


@pytest.mark.slow
def test_a_second_test_set_of_requests_is_measured_apart_and_the_gate_can_demand_it(
    taking: Workspace, played: tuple[Workspace, SimulatedOracle], tmp_path: Path
) -> None:
    layout, now = taking.layout, time.time()
    text = layout.params.read_text("utf-8")
    for old, new in (("random: 2 ", "random: 0 "), ("uncertain: 1 ", "uncertain: 0 "), ("test: 0 ", "test: 6 ")):
        assert f"  {old}" in text
        text = text.replace(f"  {old}", f"  {new}")
    layout.params.write_text(text.replace("  traffic: false", "  traffic: true"), "utf-8")
    made = open_workspace(layout.root)
    texts = tuple(f"win money now, free offer {number}" for number in range(8))
    write(layout.traffic, request(1, texts, time=int(now * 1e6) - 60_000_000))
    before = count_items([layout.test, layout.inbox_test])
    assert take_traffic(made, now) == (6, [])
    items = [item for batch in iter_items([layout.inbox_test]) for item in batch]
    assert len(request_weights(items)) == 6 and count_items([layout.test, layout.inbox_test]) == before + 6
    path, label = tmp_path / "labels.jsonl", made.params.schema_.labels[0]
    path.write_text("".join(json.dumps({"text": item.text, "label": label}) + "\n" for item in items), "utf-8")
    with locked(layout.lock, "a test"):
        ingest(made, [path], test=True, label_column="label")
    report = tick(made, lambda: played[1], options=Options(close_now=True))
    (number,) = report.published
    record = read_history(layout, Git(layout.root)).record(number)
    assert record.traffic is not None and record.traffic.metrics.items == 6
    labelled = len(read_labeled(layout.test_labels))
    assert record.metrics.items == labelled - 6 == sum(record.counts.test_labels.values()) - 6
    assert record.decision.verdict == "held"
    assert any(one.startswith("on requests: not enough evidence") for one in record.decision.reasons)
    assert "by 6 test items from requests" in record.traffic.sentence()
    found = status(made)
    assert found.traffic == record.traffic and "sentence" in found.to_json()["traffic"]
    assert record.traffic.sentence() in render(report_data(made))
