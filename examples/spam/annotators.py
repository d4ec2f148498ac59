"""Simulated annotators: people with accounts of their own, who answer in Label Studio over its REST API.

They know the truth but behave like people: they skip, err, disagree, correct themselves, and answer after the round is
closed. What somebody does with a task is a pure function (`acts_for`) of the task's round and item, the annotator and a
seed, so a repeated run gives the same labels for everybody. For the same reason they take a round's tasks from a
listing: in the label stream, who gets which task would depend on who is faster.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import httpx

from al_pipeline.errors import BadInput, LabelStudioDown, LabelStudioRefused
from al_pipeline.sanitize import has_tls

_NAMES = uuid.UUID("5f1c5b6e-3f0e-5b1e-9d0a-6f0f5f9f2a11")
_PAGE = 500
_ATTEMPTS = 4

Progress = Callable[[int, int], None]
"""Called with the number of completed acts and the total."""


@dataclass(frozen=True, slots=True)
class Annotator:
    """One simulated person. Rates are shares of the tasks that they get."""

    email: str
    token: str = field(repr=False)
    error_rate: float = 0.01
    """Gives a wrong label and does not notice."""
    skip_rate: float = 0.02
    """Skips; the next annotator takes the task."""
    correct_rate: float = 0.03
    """Gives a wrong label and corrects it: half of the time at once, half after the round is closed."""
    late_rate: float = 0.03
    """Answers only after the round is closed."""


@dataclass(frozen=True, slots=True)
class Act:
    """One action of one annotator on one task. `late`: only after the round was closed."""

    push_key: str
    email: str
    kind: Literal["answer", "skip", "correct"]
    label: str | None
    late: bool
    seconds: float
    """The time they report to have looked at it."""


@dataclass(frozen=True, slots=True)
class Done:
    """What the annotators did; `already`: what Label Studio had from an earlier, interrupted run."""

    answered: int = 0
    skipped: int = 0
    corrected: int = 0
    disagreed: int = 0
    """Tasks with different answers."""
    already: int = 0
    left_for_later: int = 0
    seconds: float = 0.0


def acts_for(
    push_key: str,
    truth: str,
    labels: Sequence[str],
    annotators: Sequence[Annotator],
    seed: int,
    doubtful_rate: float = 0.03,
) -> list[Act]:
    """What the annotators do with one task whose right label is `truth`, in order for each annotator.

    A task goes to one of them; after a skip to the next. A share `doubtful_rate` of the tasks is doubtful: the first
    annotator errs, the second disagrees, the third settles it. The workspace's id, with which a push key begins, has no
    influence.
    """
    draw = partial(chance, seed, push_key)
    wrong = [label for label in labels if label != truth]
    other = wrong[int(draw("other") * len(wrong))]
    queue = sorted(annotators, key=lambda person: draw(person.email, "order"))
    acts: list[Act] = []
    skipped = 0
    for person in queue:
        if draw(person.email, "skip") >= person.skip_rate:
            break
        acts.append(Act(push_key, person.email, "skip", None, False, 1 + 4 * draw(person.email, "seconds")))
        skipped += 1
    doubtful = draw("doubtful") < doubtful_rate
    for place, person in enumerate(queue[skipped : skipped + (3 if doubtful else 1)]):
        who, seconds = person.email, 2 + 20 * draw(person.email, "seconds")
        late = not doubtful and draw(who, "late") < person.late_rate
        if doubtful:
            acts.append(Act(push_key, who, "answer", other if place == 0 else truth, late, seconds))
        elif draw(who, "correct") < person.correct_rate:
            acts.append(Act(push_key, who, "answer", other, late, seconds))
            acts.append(Act(push_key, who, "correct", truth, late or draw(who, "correct late") < 0.5, seconds))
        else:
            label = other if draw(who, "error") < person.error_rate else truth
            acts.append(Act(push_key, who, "answer", label, late, seconds))
    return acts


def chance(seed: int, push_key: str, *what: str) -> float:
    """A number from 0 to 1, excluded, for each seed, task and `what`; workspaces do not differ in it."""
    name = "\0".join((str(seed), push_key.split(":", 1)[-1], *what))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def answer_round(
    url: str,
    project_id: int,
    annotators: Sequence[Annotator],
    key: Mapping[str, str],
    seed: int,
    *,
    round_number: int,
    late: bool = False,
    progress: Progress | None = None,
) -> Done:
    """Do in Label Studio what the annotators do with the tasks of a round; `late`: what they do after it was closed.

    `key` maps an item's id to its right label. Safe to repeat: an answer's id is derived from the task's push key and
    the annotator, so Label Studio refuses a second copy. Raises LabelStudioDown, LabelStudioRefused, BadInput.
    """
    started = time.monotonic()
    with Session(url, annotators[0].token) as session:
        form = session.form(project_id)
        tasks = {push_key: (task_id, item) for task_id, push_key, item in session.tasks(project_id, round_number)}
    if unknown := {item for _, item in tasks.values()} - key.keys():
        raise BadInput(f"the answer key lacks {len(unknown)} of the items that are asked, such as {min(unknown)}")
    acts = [
        act
        for push_key, (_, item) in tasks.items()
        for act in acts_for(push_key, key[item], form.labels, annotators, seed)
    ]
    chosen = [act for act in acts if act.late == late]
    tokens = {person.email: person.token for person in annotators}
    counts = perform(url, tokens, chosen, {name: task_id for name, (task_id, _) in tasks.items()}, form, progress)
    given: dict[str, set[str | None]] = defaultdict(set)
    for act in chosen:
        if act.kind == "answer":
            given[act.push_key].add(act.label)
    return Done(
        answered=counts["answer"],
        skipped=counts["skip"],
        corrected=counts["correct"],
        disagreed=sum(len(labels) > 1 for labels in given.values()),
        already=counts["already"],
        left_for_later=0 if late else len(acts) - len(chosen),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class OpenTask:
    """A task that waits for answers; `overlap`: how many people are to answer it."""

    task_id: int
    push_key: str
    item_id: str
    overlap: int


@dataclass(frozen=True, slots=True)
class Form:
    """The control that annotators fill in."""

    control: str
    field: str
    labels: tuple[str, ...]

    def result(self, label: str | None) -> list[dict[str, Any]]:
        if label is None:
            return []
        choice = {"from_name": self.control, "to_name": self.field, "type": "choices", "value": {"choices": [label]}}
        return [choice]


def perform(
    url: str,
    tokens: Mapping[str, str],
    acts: Sequence[Act],
    task_ids: Mapping[str, int],
    form: Form,
    progress: Progress | None,
) -> dict[str, int]:
    """Each person works through their own acts in order, all of them in parallel. Returns counts by kind of act.

    `tokens` by e-mail address, `task_ids` by push key.
    """
    counts: dict[str, int] = defaultdict(int)
    guard, stop = threading.Lock(), threading.Event()

    def work(email: str) -> None:
        with Session(url, tokens[email]) as session:
            for act in (act for act in acts if act.email == email):
                if stop.is_set():
                    return
                happened = session.perform(act, task_ids[act.push_key], form)
                with guard:
                    counts[happened] += 1
                    if progress:
                        progress(sum(counts.values()), len(acts))

    with ThreadPoolExecutor(max_workers=len(tokens)) as people:
        futures = [people.submit(work, email) for email in tokens]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
    return counts


class Session:
    """One person's connection to Label Studio. All their requests may be repeated, so all are retried."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        login = {"Authorization": f"Token {token}"}
        self._http = httpx.Client(base_url=url, headers=login, timeout=60, trust_env=False, verify=has_tls(url))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def form(self, project_id: int) -> Form:
        """The question of the project's label config; reviewers have a field for comments beside it."""
        config = self._send("GET", f"/api/projects/{project_id}/").json()["parsed_label_config"]
        [(control, about)] = [(name, one) for name, one in config.items() if one["type"] == "Choices"]
        return Form(control, about["to_name"][0], tuple(about["labels"]))

    def tasks(self, project_id: int, round_number: int) -> Iterator[tuple[int, str, str]]:
        """Id, push key and item id of a round's tasks, by id."""
        for row in self._rows(project_id, "id,data", ("data.al_round", "equal", round_number)):
            yield row["id"], row["data"]["push_key"], row["data"]["item_id"]

    def open_tasks(self, project_id: int) -> Iterator[OpenTask]:
        """The tasks of a project that wait for answers, by id."""
        for row in self._rows(project_id, "id,data,is_labeled,overlap"):
            if not row["is_labeled"]:
                yield OpenTask(row["id"], row["data"]["push_key"], row["data"]["item_id"], row["overlap"])

    def next_task(self, project_id: int) -> OpenTask | None:
        """The task that the label stream gives to this person next; None if there is none."""
        reply = self._send("GET", f"/api/projects/{project_id}/next", allow=404)
        if reply.status_code == 404:
            return None
        row = reply.json()
        return OpenTask(row["id"], row["data"]["push_key"], row["data"]["item_id"], row.get("overlap", 1))

    def _rows(self, project_id: int, include: str, *filters: tuple[str, str, int]) -> Iterator[dict[str, Any]]:
        last, size = 0, _PAGE
        while size == _PAGE:
            items = [
                {"filter": f"filter:tasks:{f}", "operator": o, "type": "Number", "value": v}
                for f, o, v in (*filters, ("id", "greater", last))
            ]
            query = json.dumps({"filters": {"conjunction": "and", "items": items}, "ordering": ["tasks:id"]})
            fixed: dict[str, str | int] = {"page": 1, "page_size": _PAGE, "fields": "task_only", "include": include}
            reply = self._send("GET", "/api/tasks", params={"project": project_id, "query": query, **fixed})
            rows = reply.json()["tasks"]
            size = len(rows)
            for row in rows:
                last = row["id"]
                yield row

    def perform(self, act: Act, task_id: int, form: Form) -> str:
        """Do `act`; returns its kind, or "already" if it was done before."""
        name = str(uuid.uuid5(_NAMES, f"{act.push_key}\0{act.email}\0{'skip' if act.kind == 'skip' else 'answer'}"))
        result = form.result(act.label)
        if act.kind == "correct":
            return self._correct(task_id, result)
        content = {
            "result": result,
            "was_cancelled": act.kind == "skip",
            "lead_time": round(act.seconds, 1),
            "unique_id": name,
        }
        reply = self._send("POST", f"/api/tasks/{task_id}/annotations/", allow=409, json=content)
        return "already" if reply.status_code == 409 else act.kind

    def _correct(self, task_id: int, result: list[dict[str, Any]]) -> str:
        me = self._send("GET", "/api/current-user/whoami").json()["id"]
        found = self._send("GET", f"/api/tasks/{task_id}/annotations/").json()
        [mine] = [one for one in found if one["completed_by"] == me and not one["was_cancelled"]]
        if [choice["value"] for choice in mine["result"]] == [choice["value"] for choice in result]:
            return "already"
        self._send("PATCH", f"/api/annotations/{mine['id']}/", json={"result": result})
        return "correct"

    def _send(self, method: str, path: str, allow: int | None = None, **content: Any) -> httpx.Response:
        failure = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(0.5 * 2**attempt)
            try:
                reply = self._http.request(method, path, **content)
            except httpx.TransportError as error:
                failure = type(error).__name__
                continue
            if reply.is_success or reply.status_code == allow:
                return reply
            failure = f"status {reply.status_code}"
            if reply.status_code < 500 and reply.status_code != 429:
                raise LabelStudioRefused(f"Label Studio at {self._url} refused {method} {path}: {failure}")
        raise LabelStudioDown(
            f"Label Studio at {self._url} did not complete {method} {path} in {_ATTEMPTS} attempts: {failure}"
        )
