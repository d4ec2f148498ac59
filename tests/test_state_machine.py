"""The state machine: total, never stuck, and a tick always ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.rounds.state_machine import BUILD, Closing, Facts, Step, Wait, close_reason, needed, next_step, state

RULE = Closing(quorum=0.9, deadline_days=7, min_labels=10)
steps = st.frozensets(st.sampled_from(list(Step)))


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    items = draw(st.integers(0, 5))
    tasks = draw(st.integers(0, 50))
    planned = draw(st.none() | st.integers(0, 9))
    closed = draw(st.booleans())
    return Facts(
        items=items,
        incoming=draw(st.integers(0, items)),
        planned=planned,
        untagged=draw(st.none() | st.integers(0, 9)),
        unsynced=draw(st.booleans()),
        tasks=tasks,
        settled=draw(st.integers(0, tasks)),
        new_labels=draw(st.integers(0, 60)),
        age_days=draw(st.floats(0, 30)),
        close_requested=draw(st.booleans()),
        amend=planned is not None and draw(st.booleans()),
        amending=closed and draw(st.booleans()),
        paused=draw(st.sampled_from(["", "paused by ann"])),
        closed=closed,
        built=draw(st.frozensets(st.sampled_from(BUILD))),
        decided=draw(st.booleans()),
        done=draw(steps),
    )


rules = st.builds(Closing, quorum=st.floats(0.01, 1), deadline_days=st.floats(0.1, 30), min_labels=st.integers(0, 20))


@given(facts(), rules)
def test_every_combination_of_facts_gives_a_step_or_a_reason(found: Facts, rule: Closing) -> None:
    step = next_step(found, rule)
    assert isinstance(step, Step) or step.reason
    assert state(found)


def after(found: Facts, step: Step) -> Facts:
    """What taking `step` does to the facts: the smallest model of a tick."""
    found = replace(found, done=found.done | {step})
    if step is Step.TAG:
        return replace(found, untagged=None)
    if step is Step.SYNC:
        return replace(found, unsynced=False)
    if step is Step.CLOSE:
        return replace(
            found, closed=True, built=frozenset(), decided=False, incoming=0, new_labels=0,
            amend=False, amending=found.amend or (found.closed and found.amending),
        )  # fmt: skip
    if step in BUILD:
        return replace(found, built=found.built | {step})
    if step is Step.DECIDE:
        return replace(found, decided=True)
    if step is Step.PUBLISH:
        number = 0 if found.planned is None else found.planned + 1
        return replace(
            found,
            planned=number,
            untagged=found.planned,
            closed=False,
            amending=False,
            tasks=8,
            settled=0,
            age_days=0.0,
            done=found.done - {Step.RETIRE, Step.PUSH, Step.SYNC},
        )
    return found


@given(facts(), rules)
def test_a_tick_ends(found: Facts, rule: Closing) -> None:
    for _ in range(60):
        step = next_step(found, rule)
        if isinstance(step, Wait):
            return
        found = after(found, step)
    pytest.fail("the tick never came to an end")


@given(facts(), rules)
def test_no_state_is_without_a_way_out(found: Facts, rule: Closing) -> None:
    """However a round stands, new items, answered tasks and `al resume` lead to a published round."""
    found = replace(found, items=max(found.items, 1), done=frozenset())
    before = -1 if found.planned is None else found.planned
    for _ in range(80):
        step = next_step(found, rule)
        if isinstance(step, Wait):
            found = replace(found, settled=found.tasks, incoming=1, new_labels=max(found.tasks, 1), done=frozenset())
            found = replace(found, paused="")
            continue
        found = after(found, step)
        if found.planned is not None and found.planned > before:
            return
    pytest.fail(f"stuck in {state(found)}")


@given(facts(), rules)
def test_an_open_round_is_pushed_and_pulled_before_it_closes(found: Facts, rule: Closing) -> None:
    found = replace(found, closed=False, amend=False, planned=found.planned or 0)
    if next_step(found, rule) is Step.CLOSE:
        assert {Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT} <= found.done


@given(facts(), rules)
def test_while_paused_only_a_intervention_about_labels_is_carried_out(found: Facts, rule: Closing) -> None:
    found = replace(found, paused="paused by ann", untagged=None, unsynced=False)
    step = next_step(found, rule)
    assert isinstance(step, Wait) != (found.amend or found.amending)
    assert step is Step.CLOSE or not found.amend


@given(st.integers(1, 10_000), st.floats(0.001, 1))
def test_quorum_is_between_one_and_all(tasks: int, quorum: float) -> None:
    assert 1 <= needed(tasks, quorum) <= tasks
    assert needed(tasks, 1.0) == tasks


def opened(**changes: object) -> Facts:
    return replace(Facts(items=100, incoming=0, planned=3, tasks=40), **changes)  # type: ignore[arg-type]


def test_the_deadline_moves_while_there_are_too_few_labels() -> None:
    assert close_reason(opened(age_days=8, new_labels=9, settled=9), RULE) is None
    assert close_reason(opened(age_days=8, new_labels=10, settled=10), RULE) is not None
    waits = next_step(opened(age_days=8, new_labels=9, settled=9, done=frozenset(Step)), RULE)
    assert isinstance(waits, Wait) and "9 of 10" in waits.reason


def test_quorum_closes_at_nine_tenths() -> None:
    assert close_reason(opened(settled=35, new_labels=35), RULE) is None
    assert close_reason(opened(settled=36, new_labels=36), RULE) == "36 of 40 tasks are settled"


def test_a_round_without_news_never_closes() -> None:
    assert close_reason(opened(age_days=365, close_requested=True), RULE) is None
    assert close_reason(opened(tasks=0), RULE) is None


def test_asked_to_close_needs_an_answer() -> None:
    assert close_reason(opened(close_requested=True, new_labels=1, settled=1), RULE) is not None


def test_a_missing_tag_comes_first() -> None:
    assert next_step(opened(untagged=2, closed=True), RULE) is Step.TAG


def test_states_have_their_names() -> None:
    assert state(Facts(items=0, incoming=0, planned=None)) == "empty"
    assert state(Facts(items=1, incoming=1, planned=None)) == "planned"
    assert state(opened()) == "open"
    assert state(opened(tasks=0)) == "exhausted"
    assert state(opened(closed=True)) == "closed"
    assert state(opened(closed=True, built=frozenset(BUILD))) == "built"
    assert state(opened(closed=True, built=frozenset(BUILD), decided=True)) == "decided"
