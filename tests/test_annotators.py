"""Simulated annotators: what they do is a function of task, person and seed; a repeat changes nothing."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import httpx
import pytest
from fault_proxy import AFTER, FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadInput, LabelStudioDown, LabelStudioRefused
from examples.spam import annotators, live
from examples.spam.annotators import Act, Annotator, Done, acts_for, answer_round

LABELS = ("ham", "spam")
PEOPLE = [Annotator(f"{name}@example.com", "token") for name in ("ada", "grace", "edsger")]
MANY = [f"ws:0001:item-{number}" for number in range(4000)]


def acts_of_many(people: list[Annotator], doubtful: float = 0.03) -> list[list[Act]]:
    return [acts_for(key, "spam", LABELS, people, 7, doubtful) for key in MANY]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    key=st.text(max_size=20),
    seed=st.integers(0, 2**31),
    rates=st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 5),
    people=st.integers(1, 4),
    truth=st.sampled_from(["a", "b", "c"]),
)
def test_what_somebody_does_keeps_to_the_rules(
    key: str, seed: int, rates: tuple[float, ...], people: int, truth: str
) -> None:
    crowd = [Annotator(f"p{number}@example.com", "t", *rates[:4]) for number in range(people)]
    acts = acts_for(key, truth, ("a", "b", "c"), crowd, seed, rates[4])
    assert acts == acts_for(key, truth, ("a", "b", "c"), list(reversed(crowd)), seed, rates[4])
    assert acts, "nobody looks at a task"
    for person in crowd:
        mine = [act.kind for act in acts if act.email == person.email]
        assert mine in ([], ["skip"], ["answer"], ["answer", "correct"])
    assert all((act.label is None) == (act.kind == "skip") for act in acts)
    assert all(act.label in ("a", "b", "c", None) for act in acts)
    assert all(act.label == truth for act in acts if act.kind == "correct")
    for before, after in zip(acts, acts[1:], strict=False):
        if after.kind == "correct":
            assert before.email == after.email
            assert before.label != truth
            assert after.late or not before.late


def test_people_keep_to_their_rates() -> None:
    acts = acts_of_many(PEOPLE)
    first = [mine[0] for mine in acts]
    share = Counter(act.email for act in first)
    assert all(count == pytest.approx(len(MANY) / 3, rel=0.1) for count in share.values())
    assert sum(act.kind == "skip" for act in first) == pytest.approx(0.02 * len(MANY), rel=0.3)
    assert sum(any(act.kind == "correct" for act in mine) for mine in acts) == pytest.approx(0.03 * len(MANY), rel=0.3)
    assert sum(any(act.late for act in mine) for mine in acts) == pytest.approx(0.045 * len(MANY), rel=0.3)


def test_a_doubtful_task_is_settled_by_a_third() -> None:
    told = [[act.label for act in mine if act.kind == "answer"] for mine in acts_of_many(PEOPLE)]
    three = [labels for labels in told if len(labels) > 1]
    assert len(three) == pytest.approx(0.03 * len(MANY), rel=0.3)
    assert all(sorted(filter(None, labels)) in (["ham", "spam", "spam"], ["ham", "spam"]) for labels in three)


def test_another_workspace_is_answered_the_same() -> None:
    def told(acts: list[list[Act]]) -> list[list[Act]]:
        return [[replace(act, push_key="") for act in mine] for mine in acts]

    elsewhere = [acts_for(key.replace("ws:", "other:", 1), "spam", LABELS, PEOPLE, 7) for key in MANY]
    assert told(elsewhere) == told(acts_of_many(PEOPLE))
    assert [mine[0].push_key for mine in elsewhere] != MANY


def test_another_seed_is_another_history() -> None:
    assert acts_of_many(PEOPLE) != [acts_for(key, "spam", LABELS, PEOPLE, 8) for key in MANY]


class Desk:
    """A project in a real Label Studio with a few tasks, and three people who have accounts."""

    def __init__(self, server: object, tasks: int) -> None:
        self.url: str = server.url  # type: ignore[attr-defined]
        headers = {"Authorization": f"Token {server.token}"}  # type: ignore[attr-defined]
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        tag = uuid.uuid4().hex[:6]
        self.people = [
            Annotator(email, server.invite(email), skip_rate=0.2, correct_rate=0.3, late_rate=0.5)  # type: ignore[attr-defined]
            for email in (f"{name}-{tag}@example.com" for name in ("ada", "grace", "edsger"))
        ]
        config = (
            '<View><Text name="text" value="$text"/><Choices name="label" toName="text" choice="single">'
            '<Choice value="ham"/><Choice value="spam"/></Choices></View>'
        )
        made = self.http.post("/api/projects/", json={"title": "annotators", "label_config": config})
        self.project = int(made.raise_for_status().json()["id"])
        self.key = {f"item-{number}": LABELS[number % 2] for number in range(tasks)}
        rows = [
            {"data": {"text": item, "item_id": item, "al_round": number, "push_key": f"{tag}:{number:04d}:{item}"}}
            for item in self.key
            for number in (1, 2)
        ]
        self.http.post(f"/api/projects/{self.project}/import", json=rows).raise_for_status()

    def answer(self, late: bool = False, url: str | None = None) -> Done:
        return answer_round(url or self.url, self.project, self.people, self.key, 7, round_number=1, late=late)

    def held(self) -> list[tuple[str, str, str | None]]:
        """(push key, annotator, label) of every annotation."""
        names = {row["id"]: row["email"] for row in self.http.get("/api/users/").json()}
        query = json.dumps({"filters": {"conjunction": "and", "items": []}, "ordering": ["tasks:id"]})
        wanted = {"project": self.project, "page_size": 200, "fields": "all", "query": query}
        found = []
        for task in self.http.get("/api/tasks", params=wanted).json()["tasks"]:
            for annotation in task["annotations"]:
                choices = [choice["value"]["choices"][0] for choice in annotation["result"]]
                label = None if annotation["was_cancelled"] else choices[0]
                found.append((task["data"]["push_key"], names[annotation["completed_by"]], label))
        return sorted(found, key=str)

    def expected(self, late: bool) -> list[tuple[str, str, str | None]]:
        """What `held` must tell when the acts up to now (and the late ones) are done."""
        wanted: dict[tuple[str, str], str | None] = {}
        tag = self.people[0].email.split("@")[0].split("-")[1]
        for item, truth in self.key.items():
            for act in acts_for(f"{tag}:0001:{item}", truth, LABELS, self.people, 7):
                if late or not act.late:
                    wanted[act.push_key, act.email] = act.label
        return sorted(((key, email, label) for (key, email), label in wanted.items()), key=str)


@pytest.fixture(scope="module")
def desk(label_studio: object) -> Iterator[Desk]:
    made = Desk(label_studio, 12)
    with closing(made.http):
        yield made


@pytest.mark.server
def test_answers_as_themselves_whatever_the_network_does(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotators.time, "sleep", lambda _: None)
    with FaultProxy(desk.url) as proxy:
        for fault in AFTER:
            if fault != "html_200":
                proxy.strike(fault, 2, method="POST", path="/annotations/")
                desk.answer(url=proxy.url)
        assert proxy.struck
    assert desk.held() == desk.expected(late=False)

    again = desk.answer()
    assert again.answered == again.skipped == again.corrected == 0
    assert desk.held() == desk.expected(late=False)

    late = desk.answer(late=True)
    assert late.answered + late.corrected == desk.answer(late=True).already > 0
    assert desk.held() == desk.expected(late=True)


@pytest.mark.server
def test_refuses_what_is_not_theirs(desk: Desk) -> None:
    stranger = [Annotator("x@example.com", "0" * 40)]
    with pytest.raises(LabelStudioRefused, match="401"):
        answer_round(desk.url, desk.project, stranger, desk.key, 7, round_number=1)
    with pytest.raises(BadInput, match="item-0"):
        answer_round(desk.url, desk.project, desk.people, {}, 7, round_number=1)


@pytest.mark.server
def test_somebody_in_the_label_stream_answers_one_task_after_the_other(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "THINKS", (0.0, 0.01))
    before, ada = len(desk.held()), desk.people[0]
    person = live.Person(ada.email, ada.token, desk.url, desk.project, desk.key)
    person.work(time.monotonic() + 2)
    assert person.failure is None and person.done["answer"] > 1
    assert len(desk.held()) - before == person.done["answer"] + person.done["skip"]
    nobody = live.Person("x@example.com", "0" * 40, desk.url, desk.project, desk.key)
    nobody.work(time.monotonic() + 2)
    assert isinstance(nobody.failure, LabelStudioRefused)


def test_says_where_it_did_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotators.time, "sleep", lambda _: None)
    with pytest.raises(LabelStudioDown, match=r"127\.0\.0\.1:9 did not"):
        answer_round("http://127.0.0.1:9", 1, PEOPLE, {}, 7, round_number=0)


def test_tokens_are_not_printed() -> None:
    assert "token" not in repr(PEOPLE[0])
