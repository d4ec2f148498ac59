"""Simulated colleagues of different care, of whom several answer each task; and a reviewer.

What somebody says to a task is a pure function of the task, the person and a seed. They answer the tasks that Label
Studio holds open, each by as many people as the task's overlap says, with their own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from al_pipeline.errors import BadInput
from examples.spam.annotators import Act, Progress, Session, chance, perform


@dataclass(frozen=True, slots=True)
class Colleague:
    """One simulated person."""

    email: str
    token: str = field(repr=False)
    accuracy: float
    """Share of right answers to the texts that they read."""
    reads: float = 1.0
    """Share of the texts that they read; to the others they give any class."""
    skip_rate: float = 0.0
    seconds: float = 12.0
    """Mean time of an answer."""

    def share_right(self, classes: int) -> float:
        """The expected share of right answers."""
        return self.reads * self.accuracy + (1 - self.reads) / classes


def acts_for(
    push_key: str, overlap: int, truth: str, labels: Sequence[str], people: Sequence[Colleague], seed: int
) -> list[Act]:
    """What is done with a task: the first `overlap` people who do not skip it answer, in an order of its own.

    With a larger overlap the same people do the same, and others follow.
    """
    draw = partial(chance, seed, push_key)
    acts: list[Act] = []
    left = overlap
    for person in sorted(people, key=lambda person: draw(person.email, "order")):
        if not left:
            break
        who, seconds = person.email, person.seconds * (0.3 + 1.4 * draw(person.email, "seconds"))
        if draw(who, "skip") < person.skip_rate:
            acts.append(Act(push_key, who, "skip", None, False, seconds))
            continue
        label = truth
        if draw(who, "reads") >= person.reads:
            label = labels[int(draw(who, "any") * len(labels))]
        elif draw(who, "right") >= person.accuracy:
            wrong = [name for name in labels if name != truth]
            label = wrong[int(draw(who, "any") * len(wrong))]
        acts.append(Act(push_key, who, "answer", label, False, seconds))
        left -= 1
    return acts


def answer_open(
    url: str,
    project_id: int,
    people: Sequence[Colleague],
    key: Mapping[str, str],
    seed: int,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Answer all tasks of a project that wait; returns counts of answers, skips and what was done `already`.

    `key` maps an item's id to its right label. Safe to repeat. Raises LabelStudioDown, LabelStudioRefused, BadInput.
    """
    with Session(url, people[0].token) as session:
        form = session.form(project_id)
        tasks = list(session.open_tasks(project_id))
    if unknown := {task.item_id for task in tasks} - key.keys():
        raise BadInput(f"the answer key lacks {len(unknown)} of the items that are asked, such as {min(unknown)}")
    acts = [
        act
        for task in tasks
        for act in acts_for(task.push_key, task.overlap, key[task.item_id], form.labels, people, seed)
    ]
    tokens = {person.email: person.token for person in people}
    done = perform(url, tokens, acts, {task.push_key: task.task_id for task in tasks}, form, progress)
    return {name: done.get(name, 0) for name in ("answer", "skip", "already")}
