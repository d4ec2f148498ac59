"""Live annotation: how soon a question of a model that knows an answer is in the queue, beside the aims.

    python -m benchmarks.live [--minutes 30] [--annotators 10] [--pause 3]      writes benchmarks/results/live.json

On a real Label Studio with `al live` as a process. Annotators are HTTP clients with tokens of their own: each asks for
the next task, waits, and answers. The pool has 100,000 short texts of 20 classes whose vectors are planted (a centre
for each class, and noise); 2,000 labels are brought along. One round is open all the time.

An answer counts from when Label Studio stored it. The latency ends when Label Studio has stored the first question that
a model chose or drew which knows this answer: by its prediction it is then first in the queue of a single annotator;
among several, Label Studio draws one of the open questions. Both times are Label Studio's. Staleness is what `al live`
says of itself twice a second. The time of `next task` is that of the annotators' requests, while `al live` runs and
then without it, with the rest of the batch in the queue.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil

from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import iter_batches
from al_pipeline.features.vectors import open_vectors
from al_pipeline.files import read_json, write_jsonl
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.live.state import read_state
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.tick import tick
from al_pipeline.rounds.manifests import parse_live
from al_pipeline.servers import admin, invite, start_label_studio, stop_label_studio
from al_pipeline.workspace.fingerprint import recorded_device
from al_pipeline.workspace.workspace import Workspace, open_workspace
from benchmarks.record import ROOT, record
from benchmarks.round import homes

AIMS = {"p50_seconds": 1.5, "p95_seconds": 5.0, "next_task_rise": 0.10}
WIDTH = 384
NOISE = 4.0
"""The length of a planted vector's noise; a centre has length 1."""
_PARTS = 5
"""Parts of the run that are compared, to see growth."""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of answering while `al live` runs")
    parser.add_argument("--annotators", type=int, default=10)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds that a person takes for an answer")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--labels", type=int, default=2_000, help="brought along")
    parser.add_argument("--name", default="live", help="name of the record in benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder, homes(Path(folder)):
        figures = measured(Path(folder), options)
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record(options.name, figures).relative_to(ROOT))  # noqa: T201


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    expected = int(1.2 * 60 * options.minutes * options.annotators / options.pause) + 200
    workspace, key = prepared(folder, options, expected)
    url = start_label_studio(workspace, tell).url
    try:
        account = admin(workspace)
        assert account is not None
        tell("the first build, with planted vectors")
        set_param(workspace, "enabled: false", "enabled: true")
        workspace = open_workspace(workspace.layout.root)
        tick(workspace, lambda: connect(workspace), run=lambda name, action: planted(workspace, name, action))
        set_param(workspace, "people: 1", f"people: {options.annotators}")
        tokens = [invite(workspace, f"person-{number}@example.org").token for number in range(options.annotators)]
        live = start(workspace)
        try:
            wait_for_questions(workspace, live)
            watch = Watch(workspace, live.pid)
            people = [Person(url, token, workspace, key, options.pause, n) for n, token in enumerate(tokens)]
            answer(people, 60 * options.minutes, watch.look)
        finally:
            live.send_signal(signal.SIGTERM)
            live.wait(120)
        found = latencies(workspace, url, account.token)
        with_live = [seconds for person in people for seconds in person.waits]
        tell("without al live: the rest of the batch is pushed")
        set_param(workspace, "enabled: true", "enabled: false")
        tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
        rest = [Person(url, token, workspace, key, options.pause, n) for n, token in enumerate(tokens)]
        answer(rest, min(300.0, 30 * options.minutes), lambda: None)
    finally:
        stop_label_studio(workspace)
    without = [seconds for person in rest for seconds in person.waits]
    rise = median(with_live) / median(without) - 1
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "name"},
        "aims": AIMS,
        "vectors": "planted",
        "answers": sum(len(person.waits) for person in people),
        "empty_queue": sum(person.empty for person in people),
        "latency_seconds": found,
        "stale_questions": watch.staleness(options.annotators),
        "memory_mib": watch.memory(),
        "next_task_seconds": {
            "with_live": summary(with_live),
            "without": summary(without),
            "rise_of_median": round(rise, 3),
        },
    }


def prepared(folder: Path, options: argparse.Namespace, batch: int) -> tuple[Workspace, dict[str, str]]:
    """A workspace with its pool and the labels that are brought along; and the right label of each item."""
    names = [f"class-{number:02d}" for number in range(options.classes)]
    draw = random.Random(1)
    rows, key = [], {}
    for number in range(options.items):
        label = draw.choice(names)
        key[f"item-{number:07d}"] = label
        known = label if number < options.labels else None
        rows.append({"id": f"item-{number:07d}", "text": f"text number {number}", "label": known})
    write_jsonl(folder / "pool.jsonl", rows)
    workspace = init(folder / "workspace", names, remote=str(folder / "remote"))
    for before, after in {
        "kind: encoder+tfidf": "kind: encoder",
        "test_size: 500": "test_size: 100",
        "batch_size: 40": f"batch_size: {min(batch, 100_000)}",
        "test_tasks: 40": "test_tasks: 0",
        "strategy: auto": "strategy: margin",
        "shortlist: 1000": f"shortlist: {max(1000, batch)}",
    }.items():
        set_param(workspace, before, after)
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [folder / "pool.jsonl"], label_column="label")
    return workspace, key


def set_param(workspace: Workspace, before: str, after: str) -> None:
    """Replace a line's part in `params.yaml`."""
    path = workspace.layout.params
    text = path.read_text(encoding="utf-8")
    if before not in text:
        raise SystemExit(f"params.yaml has no {before!r}")
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def planted(workspace: Workspace, name: str, action: Callable[[], Any]) -> Any:
    """Run a step; before the one that encodes, plant the vectors of all items: of their class, and noise."""
    layout = workspace.layout
    if name == "encode":
        engine = read_json(layout.engine)
        vectors = open_vectors(layout.encoder, layout.features, workspace.params.features, recorded_device(engine))
        assert vectors is not None
        rng = np.random.default_rng(2)
        centres = rng.standard_normal((1000, WIDTH), np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        truth = {row["id"]: row["class"] for row in classes_of(workspace)}
        for batch in iter_batches([layout.pool, layout.test], ("item_id", "content_hash"), 4096):
            rows = np.array([truth[item] for item in batch.column("item_id").to_pylist()])
            noise = rng.standard_normal((len(rows), WIDTH), np.float32) * np.float32(NOISE / np.sqrt(WIDTH))
            found = centres[rows] + noise
            vectors.store(
                batch.column("content_hash").to_pylist(), found / np.linalg.norm(found, axis=1, keepdims=True)
            )
    return action()


def classes_of(workspace: Workspace) -> list[dict[str, Any]]:
    """The class of each item, by number, as the pool's file was drawn."""
    draw, classes = random.Random(1), list(range(len(workspace.params.schema_.labels)))
    path = workspace.layout.root.parent / "pool.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [{"id": f"item-{number:07d}", "class": draw.choice(classes)} for number, _ in enumerate(lines)]


def start(workspace: Workspace) -> subprocess.Popen[bytes]:
    """`al live` as a process."""
    words = [sys.executable, "-P", "-m", "al_pipeline.cli.app", "-C", str(workspace.layout.root), "live"]
    log = (workspace.layout.root.parent / "live.log").open("wb")
    return subprocess.Popen(words, stdout=log, stderr=log, env=dict(os.environ))


def wait_for_questions(workspace: Workspace, live: subprocess.Popen[bytes]) -> None:
    """Wait until `al live` is up and has asked something."""
    deadline = time.monotonic() + 300
    while not ((state := read_state(workspace.layout)) and state.health == "up" and state.queue):
        log = (workspace.layout.root.parent / "live.log").read_text(encoding="utf-8", errors="replace")
        if live.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"al live did not come up: {log[-2000:]}")
        time.sleep(0.2)
    tell(f"al live is up: {len(state.queue)} questions, {state.model_labels} labels known")


class Person:
    """An annotator in the label stream."""

    def __init__(
        self, url: str, token: str, workspace: Workspace, key: Mapping[str, str], pause: float, number: int
    ) -> None:
        project = stored_project(workspace.layout)
        assert project is not None
        self._project, self._key, self._pause = project.project_id, key, pause
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Token {token}"}, timeout=60, trust_env=False
        )
        self._draw = random.Random(number)
        self.waits: list[float] = []
        """Seconds of each request for the next task."""
        self.empty = 0
        """How often the queue was empty."""

    def answer(self, end: float) -> None:
        """Answer until the time `end`, by `time.monotonic`."""
        time.sleep(self._draw.uniform(0, self._pause))
        while time.monotonic() < end:
            begin = time.perf_counter()
            reply = self._http.get(f"/api/projects/{self._project}/next")
            took = time.perf_counter() - begin
            if reply.status_code == 404:
                self.empty += 1
                time.sleep(1)
                continue
            reply.raise_for_status()
            self.waits.append(took)
            task = reply.json()
            time.sleep(self._pause * self._draw.uniform(0.5, 1.5))
            label = self._key[task["data"]["item_id"]]
            done = self._http.post(
                f"/api/tasks/{task['id']}/annotations/", json={"result": choice_result(label), "lead_time": self._pause}
            )
            done.raise_for_status()


def answer(people: Sequence[Person], seconds: float, look: Callable[[], None]) -> None:
    """Have all people answer for so long, each in a thread; call `look` twice a second."""
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=person.answer, args=(end,), daemon=True) for person in people]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        look()
        time.sleep(0.5)


class Watch:
    """What `al live` says of itself, and its memory, over the run."""

    def __init__(self, workspace: Workspace, pid: int) -> None:
        self._layout, self._process = workspace.layout, psutil.Process(pid)
        self._states: dict[float, tuple[int, int, int]] = {}
        self._memory: list[float] = []

    def look(self) -> None:
        """Note the state and the resident memory."""
        state = read_state(self._layout)
        if state is not None:
            at_work = sum(person.at_work for person in state.people)
            self._states[state.time] = (state.stale, len(state.queue), at_work)
        self._memory.append(self._process.memory_info().rss / 2**20)

    def staleness(self, annotators: int) -> dict[str, Any]:
        """Open questions that an earlier model chose."""
        stale = [one[0] for one in self._states.values()]
        return {
            "aim": annotators + 2,
            "median": median(stale),
            "largest": max(stale),
            "share_within_aim": round(sum(one <= annotators + 2 for one in stale) / len(stale), 4),
            "open_median": median(one[1] for one in self._states.values()),
        }

    def memory(self) -> list[float]:
        """The median resident memory of each part of the run, in MiB; its own pages and the pool's features."""
        return [round(median(part), 1) for part in parts(self._memory)]


def latencies(workspace: Workspace, url: str, token: str) -> dict[str, Any]:
    """From an answer, as stored, to the first question of a model that knows it, as stored."""
    layout = workspace.layout
    number = max(int(path.parent.name) for path in layout.rounds.glob("*/live.jsonl"))
    asked = parse_live(layout.live_plan(number).read_text(encoding="utf-8"), number)
    created = created_at(workspace, url, token)
    questions = [(one.events, created[one.task.push_key]) for one in asked if one.kind != "planned"]
    found: list[tuple[float, float]] = []
    place = 0
    for known, event in enumerate(read_events(layout.events, layout.inbox_events), 1):
        if event.round != number or event.type != "label" or event.created_at is None or not event.push_key:
            continue
        while place < len(questions) and questions[place][0] < known:
            place += 1
        if place == len(questions):
            break
        stored = datetime.fromisoformat(event.created_at).timestamp()
        found.append((stored, questions[place][1] - stored))
    seconds = [took for _, took in sorted(found)]
    return {**summary(seconds), "by_part_of_the_run": [summary(part) for part in parts(seconds)]}


def created_at(workspace: Workspace, url: str, token: str) -> dict[str, float]:
    """When Label Studio stored each task, by push key, in seconds since 1970."""
    project = stored_project(workspace.layout)
    assert project is not None
    found: dict[str, float] = {}
    with httpx.Client(base_url=url, headers={"Authorization": f"Token {token}"}, timeout=120, trust_env=False) as http:
        page = 1
        while True:
            wanted = {"project": project.project_id, "page": page, "page_size": 500, "include": "id,data,created_at"}
            reply = http.get("/api/tasks", params=wanted)
            if reply.status_code == 404:
                return found
            reply.raise_for_status()
            tasks = reply.json()["tasks"]
            for task in tasks:
                stored = re.sub(r"Z$", "+00:00", task["created_at"])
                found[task["data"]["push_key"]] = datetime.fromisoformat(stored).timestamp()
            if len(tasks) < 500:
                return found
            page += 1


def parts(values: Sequence[float]) -> list[list[float]]:
    """The values in `_PARTS` parts, in order."""
    return [list(part) for part in np.array_split(np.array(values, np.float64), _PARTS) if len(part)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Number, median and 95th percentile."""
    return {
        "count": len(values),
        "p50": round(float(np.percentile(values, 50)), 3),
        "p95": round(float(np.percentile(values, 95)), 3),
    }


def tell(message: str) -> None:
    """Say what is done, on standard error."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
