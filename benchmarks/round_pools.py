"""Pools of any size, and histories of hundreds of rounds, for `benchmarks.round`.

A pool beyond the corpus consists of passages of real e-mails, each with a number of its own. The vector of a passage is
planted: that of its e-mail, and noise. Its class is the e-mail's.

A history is made by the product's own functions, on files, a git repository, a DVC repository and a Label Studio of its
own: plans, tasks imported in bulk with their answers, the pull that reads them, parts of the ledger, records, commits
and tags. What a build would have written is a copy: a record is the first round's with other numbers, and an output of
a stage is an object of the same size in DVC's cache and remote. The answers are dated back, since a pull looks back
over ten minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from al_pipeline.data.ledger import last_part, read_events
from al_pipeline.data.pool import iter_texts, read_ids
from al_pipeline.features.cache import CHUNK
from al_pipeline.features.vectors import guide_vectors, open_vectors
from al_pipeline.files import read_json, sha256_bytes, write_json, write_jsonl, write_text
from al_pipeline.integrations.dvc.digests import digest, listing_bytes, listing_digest
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.payloads import choice_result, task_json
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.operations import publish
from al_pipeline.operations.connect import stored_project
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan_rows, read_plans
from al_pipeline.operations.pull import PullRequest, pull
from al_pipeline.operations.steps.label_studio import shown_tasks
from al_pipeline.records import PlannedTask, push_key
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.fingerprint import recorded_device
from al_pipeline.workspace.layout import Layout, pointer_of
from al_pipeline.workspace.workspace import Workspace

NOISE = 0.5
"""The length of a planted vector's noise; a vector of the encoder has length 1."""
_WORDS = (60, 200)
"""The shortest and the longest passage, in words."""
_IMPORT = 500
_SECONDS = 600.0
_TABLES = ("task", "task_completion")
"""Label Studio's tables of tasks and answers."""
_PLANTED = "passage-"

Rows = list[dict[str, str]]


# Pools ---------------------------------------------------------------------------------------------------------------
def rows_of(mails: Rows, key: Mapping[str, str], size: int) -> tuple[Rows, dict[str, str]]:
    """The first `size` e-mails (id, text), then passages of them; and the right label of each."""
    rows = sorted(mails, key=lambda row: row["id"])[:size]
    labels = {row["id"]: key[row["id"]] for row in rows}
    words = [row["text"].split() for row in rows]
    draw = random.Random(1)
    for number in range(size - len(rows)):
        mail = _mail_of(number, len(mails))
        length, start = draw.randint(*_WORDS), draw.randrange(max(1, len(words[mail]) - _WORDS[0]))
        name = f"{_PLANTED}{number:07d}"
        rows.append({"id": name, "text": f"{number} {' '.join(words[mail][start : start + length])}"})
        labels[name] = labels[rows[mail]["id"]]
    return rows, labels


def _mail_of(number: int, mails: int) -> int:
    return number * 7919 % mails


def plant_vectors(workspace: Workspace, mails: Sequence[str]) -> None:
    """Encode the e-mails (their texts, in the order of `rows_of`), then plant the vectors of all passages."""
    layout, features = workspace.layout, workspace.params.features
    vectors = open_vectors(layout.encoder, layout.features, features, recorded_device(read_json(layout.engine)))
    assert vectors is not None
    known = guide_vectors(vectors, mails)
    assert known is not None
    rng = np.random.default_rng(2)
    for hashes, texts in _chunks(layout):
        rows = np.array([_mail_of(int(text.partition(" ")[0]), len(mails)) for text in texts])
        noise = rng.standard_normal((len(rows), known.shape[1]), np.float32)
        found: NDArray[np.float32] = known[rows] + NOISE / np.sqrt(known.shape[1], dtype=np.float32) * noise
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        vectors.store(hashes, found)
    vectors._cache.remember_written()


def _chunks(layout: Layout) -> Iterator[tuple[list[str], list[str]]]:
    """Content hashes and texts of the passages, as many as a shard has."""
    folders = [layout.pool, layout.test]
    ids = list(read_ids(folders).ids())
    hashes: list[str] = []
    texts: list[str] = []
    for item_id, (content, text) in zip(ids, iter_texts(folders), strict=True):
        if item_id.startswith(_PLANTED):
            hashes.append(content)
            texts.append(text)
        if len(hashes) == CHUNK:
            yield hashes, texts
            hashes, texts = [], []
    if hashes:
        yield hashes, texts


# Histories -----------------------------------------------------------------------------------------------------------
class History:
    """Adds rounds to a workspace whose last published round is real, and whose open round is answered."""

    def __init__(self, workspace: Workspace, oracle: Oracle, http: httpx.Client, key: Mapping[str, str]) -> None:
        self._workspace, self._oracle, self._http, self._key = workspace, oracle, http, key
        self._layout, self._git = workspace.layout, Git(workspace.layout.root)
        self._objects = _Objects(workspace)
        project = stored_project(workspace.layout)
        assert project is not None
        self._project: ProjectRef = project

    def grow(self, rounds: int, tasks: int, batch: int, tell: Callable[[str], None]) -> None:
        """Publish rounds until there are `rounds`, each with answers to `tasks` items; leave one of `batch` open."""
        found = read_history(self._layout, self._git)
        assert found.planned is not None
        template = found.record(found.planned - 1)
        plans = self._plans(found.planned + 1, rounds, tasks, batch)
        with self._database() as connection:
            last = {table: connection.execute(f"SELECT max(id) FROM {table}").fetchone()[0] for table in _TABLES}
        for number in range(found.planned + 1, rounds):
            self._import(plans[number])
            if number % 50 == 0:
                tell(f"the tasks of {number} rounds and their answers are in Label Studio")
        self._date_back(last)
        tell("the answers are pulled")
        self._pull([task for plan in plans.values() for task in plan])
        parts = self._parts()
        tell("the rounds are committed")
        lock = self._layout.dvc_lock.read_text(encoding="utf-8")
        for number in range(found.planned, rounds):
            asked = found.open_tasks() if number == found.planned else plans[number]
            self._publish(template, number, asked, plans[number + 1], parts.get(number, []), number == rounds - 1, lock)

    def _plans(self, first: int, last: int, tasks: int, batch: int) -> dict[int, list[PlannedTask]]:
        """The plans of the rounds from `first` to `last`. The first one asks for the rest of the test set."""
        asked = {task.item_id for task in read_plan_rows(self._git)}
        rest = {}
        for part, folder in (("pool", self._layout.pool), ("test", self._layout.test)):
            known = read_ids([folder])
            rest[part] = [one for one in zip(known.ids(), known.hashes(), strict=True) if one[0] not in asked]
        found = {}
        for number in range(first, last + 1):
            size = batch if number == last else tasks
            chosen = [*(("test", one) for one in rest["test"]), *(("pool", one) for one in rest["pool"][:size])]
            rest = {"test": [], "pool": rest["pool"][size:]}
            found[number] = [self._task(number, rank, part, *one) for rank, (part, one) in enumerate(chosen)]
        return found

    def _task(self, number: int, rank: int, part: Any, item: str, content: str) -> PlannedTask:
        key = push_key(self._workspace.id, number, item)
        if part == "test":
            return PlannedTask(key, item, content, part, number, rank, 0.0, "test_set", 1.0)
        strategy = "random_slice" if rank % 10 == 0 else "margin"
        return PlannedTask(key, item, content, part, number, rank, 0.5, strategy, 0.01, self._key[item], 0.75)

    def _import(self, plan: Sequence[PlannedTask]) -> None:
        """Import the tasks of a plan with the right answers."""
        shown = shown_tasks(self._workspace, plan)
        for start in range(0, len(shown), _IMPORT):
            rows = [
                {
                    **task_json(task),
                    "annotations": [{"result": choice_result(self._key[task.plan.item_id]), "lead_time": 5.0}],
                }
                for task in shown[start : start + _IMPORT]
            ]
            path = f"/api/projects/{self._project.project_id}/import"
            self._http.post(path, json=rows, timeout=_SECONDS).raise_for_status()

    def _database(self) -> contextlib.closing[sqlite3.Connection]:
        """Label Studio's database."""
        path = self._workspace.home / "label-studio/data/label_studio.sqlite3"
        return contextlib.closing(sqlite3.connect(path, timeout=60))

    def _date_back(self, last: Mapping[str, int]) -> None:
        """Spread tasks and answers over the time before yesterday, in the order of their numbers.

        Those up to the numbers `last` keep their times, by which their answers are known.
        """
        with self._database() as connection, connection:
            for table, number in last.items():
                when = f"julianday('now') - 1 - ((SELECT max(id) FROM {table}) - id) / 5000.0"
                text = f"strftime('%Y-%m-%d %H:%M:%f', {when}) || '000'"
                connection.execute(f"UPDATE {table} SET created_at = {text}, updated_at = {text} WHERE id > {number}")

    def _pull(self, more: Sequence[PlannedTask]) -> None:
        """Pull everything, as the first audit of a clone does."""
        params = self._workspace.params
        plans = {**read_plans(self._git), **{task.push_key: task for task in more}}
        now = "2100-01-01T00:00:00+00:00"
        pull(
            self._layout,
            self._oracle,
            PullRequest(self._project, plans, params.schema_, params.annotators, now, 0, audit=True),
        )

    def _parts(self) -> dict[int, Rows]:
        """The events in the inbox as rows, by round; the inbox is empty afterwards."""
        found: dict[int, Rows] = {}
        for event in read_events(self._layout.inbox_events):
            found.setdefault(event.round, []).append(event.to_row())
        for path in self._layout.inbox_events.glob("*.jsonl"):
            path.unlink()
        return found

    def _publish(
        self,
        template: RoundRecord,
        number: int,
        asked: Sequence[PlannedTask],
        upcoming: Sequence[PlannedTask],
        events: Rows,
        is_last: bool,
        lock: str,
    ) -> None:
        """What `publish` does for round `number`; DVC itself is asked once, for the last one."""
        layout, counts = self._layout, template.counts
        write_jsonl(layout.events / f"part-{last_part(layout.events) + 1:06d}.jsonl", events)
        write_jsonl(layout.plan(number + 1), (asdict(task) for task in upcoming))
        if is_last:
            write_text(layout.dvc_lock, lock)
            with open_dvc(layout) as dvc:
                dvc.add(layout.events)
                dvc.push()
        else:
            write_text(layout.dvc_lock, self._objects.of_round(lock))
            write_text(pointer_of(layout.events), self._objects.ledger())
        before = sum(1 for _ in layout.events.glob("part-*.jsonl")) * len(asked)
        labelled = min(counts.pool, before)
        told = replace(
            counts,
            labelled=labelled,
            pending=0,
            ignored=0,
            unlabelled=counts.pool - labelled,
            events=before,
        )
        record = replace(
            template,
            round=number,
            parent=self._git.head(),
            counts=told,
            hashes={name: sha256_bytes(f"{number} {name}".encode()) for name in template.hashes},
            answers=replace(template.answers, tasks=len(asked), answered=len(events), unanswered=0, given_up=0),
        )
        write_json(layout.record(number), record.to_json())
        write_json(layout.state(number), {"opened_at": 1.7e9 + 1000 * number, "closed_at": 1.7e9 + 1000 * number + 900})
        self._git.commit(f"round-{number:04d}: {labelled} labelled", [*layout.owned, layout.params, layout.dvc_yaml])
        publish.tag(self._git, layout, number)


class _Objects:
    """Objects in DVC's cache and remote."""

    _MOST = 65_536

    def __init__(self, workspace: Workspace) -> None:
        self._layout = workspace.layout
        with open_dvc(workspace.layout) as dvc:
            remote = dvc.check_writable()
        self._places = (workspace.layout.root / ".dvc/cache/files/md5", Path(remote) / "files/md5")
        self._listing: list[dict[str, str]] = []
        self._draw = random.Random(3)

    def of_round(self, lock: str) -> str:
        """Another version of `dvc.lock`, with new objects for the outputs of all stages."""
        from al_pipeline.yaml_text import read_yaml

        for stage in read_yaml(lock)["stages"].values():
            for out in stage["outs"]:
                path = self._layout.root / out["path"]
                if str(out["md5"]).endswith(".dir"):
                    listing = [
                        {"md5": self._put(file.stat().st_size), "relpath": file.name} for file in sorted(path.iterdir())
                    ]
                    self._write(listing_digest(listing), listing_bytes(listing))
                    lock = lock.replace(out["md5"], listing_digest(listing))
                elif out["path"].startswith("data/"):
                    lock = lock.replace(out["md5"], self._put(out["size"]))
        return lock

    def ledger(self) -> str:
        """The pointer to the ledger as it is now, whose listing is a new object."""
        known = {row["relpath"] for row in self._listing}
        files = sorted(self._layout.events.iterdir())
        for file in files:
            if file.name not in known:
                found = digest(file)
                assert found is not None
                self._listing.append({"md5": found, "relpath": file.name})
                self._write(found, file.read_bytes())
        self._listing.sort(key=lambda row: row["relpath"])
        name = listing_digest(self._listing)
        self._write(name, listing_bytes(self._listing))
        size = sum(file.stat().st_size for file in files)
        return f"outs:\n- md5: {name}\n  size: {size}\n  nfiles: {len(files)}\n  hash: md5\n  path: events\n"

    def _put(self, size: int) -> str:
        """A new object of about this size, and its name."""
        data = self._draw.randbytes(min(size, self._MOST))

        name = hashlib.md5(data, usedforsecurity=False).hexdigest()
        self._write(name, data)
        return name

    def _write(self, name: str, data: bytes) -> None:
        for place in self._places:
            path = place / name[:2] / name[2:]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
                path.chmod(0o444)
