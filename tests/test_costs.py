"""What answers cost: their seconds, predicted; the budget, past which nothing is asked; the forecast of a round."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Played, answer_all, change_params, go_on, play
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.costs.answer_times import IDLE, as_array, capped, filled
from al_pipeline.costs.budget import affordable, answers_left, exhausted, spent, uses
from al_pipeline.costs.forecast import LEAST_ROUNDS, forecast
from al_pipeline.costs.seconds import LEAST, fit_seconds, predict
from al_pipeline.data.ledger import append_part
from al_pipeline.errors import BadParams
from al_pipeline.evaluation.figures import Control, Estimate
from al_pipeline.evaluation.online import labels_saved
from al_pipeline.evaluation.savings import compare, over_seconds
from al_pipeline.files import read_json
from al_pipeline.notifications.messages import Answer
from al_pipeline.operations import costs
from al_pipeline.operations.answers import answers_given
from al_pipeline.operations.checks.services import check_budget
from al_pipeline.operations.close import carry_out
from al_pipeline.operations.costs import answer_cost, spent_so_far
from al_pipeline.operations.report import report_data
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.params import NO_BUDGET, Budget, parse_params
from al_pipeline.records import RANDOM, Event, Item, Selection
from al_pipeline.reporting.page import render
from al_pipeline.rounds.interventions import Intervention
from al_pipeline.rounds.state_machine import Closing, Facts, Step, Wait, close_reason, next_step
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
NO_TIMES: list[float | None] = [None, math.nan, math.inf, -5.0, 0.0]
"""What is no time: none, not a number, endless, negative, none at all."""


# Seconds -------------------------------------------------------------------------------------------------------------


def test_what_is_no_time_and_what_is_idle() -> None:
    """A day on the screen counts for ten times the median, and what is no time for nothing."""
    times, cap = capped(as_array([*NO_TIMES, 4.0, 5.0, 6.0, 86_400.0]))
    assert cap == IDLE * 5.5 and np.nansum(times) == 4 + 5 + 6 + cap
    assert np.isnan(times[:5]).all()
    assert filled([4.0, None, 6.0, -1.0]) == [4.0, 5.0, 6.0, 5.0]
    assert capped(as_array(NO_TIMES))[1] is None and filled(NO_TIMES) is None and filled([]) is None


@pytest.mark.parametrize("kind", ["label", "skip", "import", "supersede", "delete", "adjudicate", "gold", "correct"])
@pytest.mark.parametrize("who", ["ann", "import"])
def test_the_only_answer_to_an_item_is_counted_as_one_among_others(kind: Any, who: str) -> None:
    """Nearly all items have one event. Another that says nothing of it takes the way of items with several."""
    label = None if kind in ("skip", "delete", "correct") else "ham"
    one = Event("1", kind, "a", "hash", "pool", 3, "ws:0003:a#p.1", who, label, lead_time=4, prelabel_shown=True)
    other = Event("2", "task_gone", "a", "hash", "pool", 3, "ws:0003:a", "")
    assert list(answers_given([one])) == list(answers_given([one, other]))
    assert len(list(answers_given([one]))) == (who == "ann" and kind in ("label", "skip", "supersede"))


def answers(n: int, seed: int = 0, slope: float = 0.6) -> dict[str, Any]:
    """n answers whose seconds grow with length, of a slow class and a slow person."""
    rng = np.random.default_rng(seed)
    characters = rng.integers(20, 4000, n)
    labels = rng.choice(["ham", "spam"], n)
    people = rng.choice(["ann", "bob", "cy"], n)
    logs = 1 + slope * np.log1p(characters) + 0.7 * (labels == "spam") + 0.5 * (people == "bob")
    seconds = np.exp(logs - 3 + rng.normal(0, 0.3, n))
    return {
        "seconds": seconds.tolist(),
        "characters": characters.tolist(),
        "labels": labels.tolist(),
        "annotators": people.tolist(),
    }


def test_seconds_are_predicted_by_length_class_and_person() -> None:
    found = fit_seconds(**answers(2000))
    assert found is not None and found.answers == 2000 and found.explained > 0.6
    assert found.cost.slope == pytest.approx(0.6, abs=0.03)
    assert found.cost.classes["spam"] - found.cost.classes["ham"] == pytest.approx(0.7, abs=0.05)
    assert found.people["bob"] - found.people["ann"] == pytest.approx(0.5, abs=0.05)
    other = answers(2000, seed=1)
    characters = np.array(other["characters"], float)
    proba = np.array([[label == "ham", label == "spam"] for label in other["labels"]], float)
    expected = predict(found.cost, characters, proba, ["ham", "spam"])
    assert expected.mean() == pytest.approx(np.mean(other["seconds"]), rel=0.1)
    assert predict(found.cost, characters, proba, ["ham", "spam"], found.people["bob"]).mean() > expected.mean()
    assert np.all(predict(found.cost, np.array([0.0, 1e9])) <= predict(found.cost, np.array([4000.0]))[0])


def test_few_times_or_none_give_no_model() -> None:
    few = answers(LEAST - 1)
    assert fit_seconds(**few) is None and fit_seconds([], [], [], []) is None
    assert fit_seconds(NO_TIMES * 20, [10] * 100, ["ham"] * 100, ["ann"] * 100) is None
    alone = fit_seconds([5.0] * 40, [100] * 40, [None] * 40, ["ann"] * 40)
    assert alone is not None and alone.cost.classes == {} and alone.explained == 0.0
    assert predict(alone.cost, np.array([1.0, 100.0, 9e9])) == pytest.approx([5.0] * 3)
    assert predict(alone.cost, np.array([100.0]), np.array([[0.5, 0.5]]), ["x", "y"]) == pytest.approx([5.0])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(60)))
def test_the_order_of_answers_changes_nothing(order: list[int]) -> None:
    rows = answers(60)
    assert fit_seconds(**{key: [values[place] for place in order] for key, values in rows.items()}) == fit_seconds(
        **rows
    )


def test_times_of_days_move_a_prediction_little() -> None:
    rows = answers(200)
    before = fit_seconds(**rows)
    rows["seconds"][::40] = [3 * 86_400.0] * 5
    after = fit_seconds(**rows)
    assert before is not None and after is not None
    assert predict(after.cost, np.array([500.0]))[0] < 2 * predict(before.cost, np.array([500.0]))[0]


def test_scores_per_second_prefer_what_is_answered_soon() -> None:
    view = Shortlist(["a", "b", "c"], np.array([0.9, 0.9, 0.1]))
    found = view.per_second(np.array([10.0, 2.0, 2.0]))
    assert found.scores is not None and np.argsort(-found.scores).tolist() == [1, 0, 2]
    assert view.per_second(np.full(3, 7.0)).scores == pytest.approx(view.scores)
    for wrong in (np.array([1.0, 0.0, 1.0]), np.array([1.0, np.nan, 1.0]), np.array([1.0])):
        with pytest.raises(ValueError, match="positive"):
            view.per_second(wrong)
    with pytest.raises(ValueError, match="below 0"):
        Shortlist(["a"], np.array([-1.0])).per_second(np.ones(1))
    with pytest.raises(ValueError, match="no scores"):
        Shortlist(["a"]).per_second(np.ones(1))


# The budget ----------------------------------------------------------------------------------------------------------


def budget(**limits: float) -> Budget:
    return replace(NO_BUDGET, **limits)


def test_what_is_spent_and_what_is_left() -> None:
    cost = spent([10.0, 20.0, None, 30.0], [False, False, False, True])
    assert (cost.labels, cost.answers, cost.timed, cost.seconds) == (3, 4, 3, 80.0)
    limits = budget(labels=4, hours=1.0, money=100.0, hourly_rate=36.0)
    found = {one.what: one for one in uses(limits, cost)}
    assert found["labels"].left == 1 and found["hours"].left == pytest.approx(1 - 80 / 3600)
    assert found["money"].spent == pytest.approx(0.8)
    assert answers_left(limits, cost) == 1 and exhausted(limits, cost) == ""
    assert answers_left(budget(hours=0.03), cost) == 1, "28 s are left, of 20 s each"
    assert exhausted(budget(hours=0.025), cost) == "the budget of hours (0.0 of 0.0) is spent"
    assert exhausted(budget(labels=3, money=0.5, hourly_rate=36), cost).count(" and ") == 1
    assert exhausted(budget(labels=2), cost) == "the budget of labels (3 of 2) is spent"
    assert uses(NO_BUDGET, cost) == () and answers_left(NO_BUDGET, cost) is None


def test_hours_are_not_known_without_times() -> None:
    """They then limit nothing, and the sentence says so; before the first answer nothing is spent."""
    untimed, none = spent(NO_TIMES, [False] * 5), spent([], [])
    (one,) = uses(budget(hours=1), untimed)
    assert one.spent is None and "no answer has a time" in one.sentence()
    assert answers_left(budget(hours=1), untimed) is None and exhausted(budget(hours=1), untimed) == ""
    (one,) = uses(budget(money=10, hourly_rate=5), none)
    assert one.spent == 0.0 and exhausted(budget(hours=1), none) == ""
    assert answers_left(budget(labels=7, hours=1), none) == 7


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 40))
def test_tasks_are_asked_in_order_until_the_room_is_full(needed: list[int], room: int) -> None:
    chosen = affordable(needed, room)
    asked = [n for n, yes in zip(needed, chosen, strict=True) if yes and n]
    assert sum(asked[:-1]) < max(room, 1) and (sum(asked) >= room or asked == [n for n in needed if n])
    assert all(yes for n, yes in zip(needed, chosen, strict=True) if not n)


def test_money_needs_a_rate() -> None:
    with pytest.raises(BadParams, match="hourly_rate"):
        parse_params(TEMPLATE.replace("money: 0 ", "money: 5 "))
    for wrong in ("labels: -1 ", "labels: 1.5 ", "labels: many "):
        with pytest.raises(BadParams, match="budget.labels"):
            parse_params(TEMPLATE.replace("labels: 0 ", wrong))
    assert not parse_params(TEMPLATE).budget.is_set


def test_a_round_past_its_budget_asks_nothing_and_closes_with_what_it_has() -> None:
    rule = Closing(0.9, 7, 10)
    done = frozenset({Step.CONNECT, Step.RETIRE, Step.PULL, Step.INGEST})
    open_round = Facts(items=9, incoming=0, planned=3, tasks=40, settled=12, new_labels=12, done=done)
    assert next_step(open_round, rule) is Step.PUSH
    over = replace(open_round, budget="the budget of labels (52 of 50) is spent")
    assert next_step(over, rule) is Step.AUDIT and "budget" in (close_reason(over, rule) or "")
    waits = next_step(replace(over, new_labels=9), rule)
    assert isinstance(waits, Wait) and "higher `budget`" in waits.reason
    room = next_step(replace(open_round, done=done | {Step.PUSH}, room=5), rule)
    assert isinstance(room, Wait) and "room for 5 more answers" in room.reason


# The forecast --------------------------------------------------------------------------------------------------------


def history(rng: np.random.Generator, rounds: int, tests: int) -> tuple[list[int], list[float], list[float]]:
    """A learning curve measured on one test set: what all rounds share of its noise, and what they do not."""
    end, drop, power = rng.uniform(0.02, 0.2), rng.uniform(0.5, 3), rng.uniform(0.2, 1.0)
    labels = 80 + 40 * np.arange(rounds)
    errors = np.clip(end + drop * labels.astype(float) ** -power, 0, 0.9)
    noise = np.sqrt(errors * (1 - errors) / tests)
    scores = 1 - errors - noise * (0.8 * rng.normal() + 0.6 * rng.normal(size=rounds))
    return labels.tolist(), np.clip(scores, 0, 1).tolist(), noise.tolist()


def test_the_interval_holds_the_next_score_as_often_as_it_says() -> None:
    rng, inside, errors = np.random.default_rng(7), [], []
    for _ in range(40):
        labels, scores, noise = history(rng, 9, int(rng.choice([200, 500, 2000])))
        for n in range(LEAST_ROUNDS, 9):
            found = forecast(labels[:n], scores[:n], 40, noise[n - 1])
            assert found is not None and found.labels == labels[n] and 0 <= found.low <= found.value <= found.high <= 1
            inside.append(found.low <= scores[n] <= found.high)
            errors.append(found.value - scores[n])
    assert 0.9 <= np.mean(inside) <= 0.995
    assert abs(np.mean(errors)) < 0.01


def test_what_cannot_be_forecast() -> None:
    assert forecast([80, 120], [0.7, 0.8], 40) is None, "too few"
    assert forecast([80, 80, 80], [0.7, 0.8, 0.8], 40) is None, "at one number of labels"
    assert forecast([80, 120, 160], [0.7, math.nan, 0.8], 40) is None
    assert forecast([80, 120, 160], [0.7, 0.75, 0.8], 0) is None, "nothing more is asked"
    assert forecast([], [], 40) is None


def test_curves_that_fall_or_stand_still_are_forecast_too() -> None:
    falling = forecast([80, 120, 160, 200], [0.9, 0.85, 0.8, 0.75], 40, 0.01)
    still = forecast([80, 120, 160, 200], [1.0] * 4, 40, 0.001)
    assert falling is not None and 0.6 < falling.value < 0.95
    assert still is not None and still.high == 1.0 and still.low > 0.97
    assert forecast([80, 120, 160], [0.7, 0.8, 0.82], 40) == forecast([80, 120, 160], [0.7, 0.8, 0.82], 40)


# Savings in hours ----------------------------------------------------------------------------------------------------


def test_savings_are_told_in_hours_too() -> None:
    control = Control(labels=100, macro_f1=Estimate(value=0.8))
    rounds = [(40, 0.7), (80, 0.81)]
    found = labels_saved(rounds, control, [400.0, 1800.0], 36.0)
    assert found is not None and (found.random_hours, found.hours) == (1.0, 0.5)
    assert found.sentence() == (
        "100 random labels (1.0 h) alone reach macro-F1 0.800; the rounds were as good with 80 (30 min)"
    )
    plain = labels_saved(rounds, control, [None, None], None)
    assert plain is not None and "(" not in plain.sentence()


def test_curves_are_compared_at_equal_seconds() -> None:
    """One that needs half the time at each label count saves half of it, whatever it saves of labels."""
    scores = [np.array([0.5, 0.6, 0.7, 0.8]) + seed / 1000 for seed in range(4)]
    times = [np.array([100.0, 200.0, 300.0, 400.0])] * 4
    seconds = {RANDOM: times, "fast": [one / 2 for one in times]}
    grid, tables = over_seconds({RANDOM: scores, "fast": scores}, seconds)
    assert grid[0] == 100 and grid[-1] == 200
    found = compare(grid.astype(int).tolist(), tables, np.full(4, 0.6 / 0.95), np.random.default_rng(0), shares=(95,))
    assert found.arms["fast"].savings[95].saving.value == pytest.approx(2.0, rel=0.05)
    with pytest.raises(ValueError, match="no number of seconds"):
        over_seconds({"a": scores}, {"a": [times[0], times[0] + 1000, *times[2:]]})


# Whole rounds --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_asked_past_the_budget(started: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """22 tasks of round 0 are answered, and 7 more answers may be given."""
    workspace, oracle, truth = go_on(started, tmp_path)
    told: list[str] = []

    def send(_: Any, messages: Any) -> list[Answer]:
        told.extend(one.title for one in messages["AL_NOTIFY_URLS:1"])
        return [Answer("AL_NOTIFY_URLS:1", "JSON", one.key, True, "delivered") for one in messages["AL_NOTIFY_URLS:1"]]

    monkeypatch.setenv("AL_NOTIFY_URLS", "json://127.0.0.1:9")
    monkeypatch.setattr("al_pipeline.integrations.notification_services.send", send)
    change_params(workspace, {"labels: 0 ": "labels: 29 "})

    def run() -> Any:
        return tick(open_workspace(workspace.layout.root), lambda: oracle)

    assert answer_all(oracle, truth) == 22
    assert run().published == (0,)
    queue = oracle.queue("ann@example.org")
    assert len(queue) == 7, "of the 8 tasks of round 1"
    answer_all(oracle, truth)
    report = run()
    assert report.published == (1,) and "the budget of labels (29 of 29) is spent" in report.waits_for
    assert oracle.queue("ann@example.org") == []
    assert [one for one in told if "budget" in one] == ["workspace: The budget of labels is spent"]
    again = run()
    assert again.published == () and again.waits_for == report.waits_for
    found = status(open_workspace(workspace.layout.root), ask=False)
    (use,) = found.budget
    assert (use.what, use.spent, use.left) == ("labels", 29, 0) and "is spent" in found.next
    assert found.cost is not None and found.cost.seconds == 29.0, "the fake's answers take a second"
    page = render(report_data(open_workspace(workspace.layout.root)))
    assert next(check_budget(open_workspace(workspace.layout.root))).message == "29 of 29 labels spent, 0 left"
    assert "29 of 29 labels spent, 0 left" in page and "29 answers took 0.0 hours" in page
    change_params(workspace, {"labels: 29 ": "labels: 40 "})
    run()
    assert len(oracle.queue("ann@example.org")) == 8, "a raised budget goes on with the plan"


@pytest.mark.slow
def test_a_batch_by_seconds(once: Played, tmp_path: Path) -> None:
    """Once enough answers have a time, the expected seconds are recorded, and the batch is selected by them."""
    workspace, oracle, truth = go_on(once, tmp_path)
    change_params(workspace, {"cost: items ": "cost: seconds "})
    layout = workspace.layout
    assert answer_cost(layout) is None, "fewer than 30 times"
    assert "cost" not in read_json(layout.overrides) and "second" not in read_json(layout.choice)["reason"]
    play(workspace, oracle, truth, 1)
    assert spent_so_far(layout).timed >= LEAST
    assert read_json(layout.overrides)["cost"]["slope"] == pytest.approx(0.0, abs=1e-6), "each answer took a second"
    assert "per second" in read_json(layout.choice)["reason"]
    (made,) = reproduce(open_workspace(layout.root), [1])
    assert (made.compared, made.difference) == ("bytes", None), "the batch is made again by what was recorded"
    record = read_json(layout.record(1))
    assert record["params"]["select"]["cost"] == "seconds" and record["cost"]["timed"] == record["cost"]["answers"]


def test_records_of_before_are_read_and_the_default_is_not_recorded(undisturbed: Workspace) -> None:
    from al_pipeline.rounds.manifests import parse_record

    row = read_json(undisturbed.layout.record(1))
    assert not {"budget", "notify"} & row["params"].keys() and "cost" not in row["params"]["select"]
    del row["cost"]
    assert "outlook" not in row, "two rounds are too few"
    old = parse_record(json.dumps(row), "rounds/0001/round.json")
    assert old.cost is None and old.outlook is None
    assert "cost" not in read_json(undisturbed.layout.overrides)


def test_a_close_that_was_killed_expects_the_same_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the close revokes has no part in them, whether it is in the ledger already or not."""
    layout = Layout(tmp_path)
    layout.events.mkdir(parents=True)
    rows = [
        Event(f"{who} {n}", "label", f"i{n}", "h", "pool", 0, f"ws:0000:i{n}#{who}.1", who, "ham", lead_time=seconds)
        for n in range(40)
        for who, seconds in (("ann", 5.0), ("bob", 50.0))
    ]
    append_part(layout.events, rows)
    items = {f"i{n}": Item(f"i{n}", "h", "text " * (n + 1)) for n in range(40)}
    monkeypatch.setattr(costs, "fetch", lambda _, ids: {one: items[one] for one in ids})
    revoked = Intervention(1, "revoke", 1, "me", "2026-01-01", "", labels=True, selection=Selection(annotator="bob"))
    coming = carry_out([revoked], layout.events)
    before = answer_cost(layout, coming)
    append_part(layout.events, coming)
    assert carry_out([revoked], layout.events) == []
    assert before is not None and before == answer_cost(layout)
