"""Agreement and error rates: published tables, laws, other libraries, and who is named among simulated annotators."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from annotating import leave
from harness import small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from typer.testing import CliRunner

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.dawid_skene import dawid_skene
from al_pipeline.cli.app import app
from al_pipeline.costs.answer_times import IDLE
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import NothingToDo
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.files import read_json
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.connect import connect
from al_pipeline.operations.quality import quality, quality_of
from al_pipeline.operations.report import report_data
from al_pipeline.operations.tick import tick
from al_pipeline.quality.accuracies import accuracies
from al_pipeline.quality.agreement import MOST_INTERVALS, NO_OVERLAP, ONE_CLASS, _draws, agreement, pair_kappas
from al_pipeline.quality.answers import SKIP, Given, Votes, consensus_of_others, to_votes
from al_pipeline.quality.assessment import Quality, assess
from al_pipeline.quality.suspicion import who_stands_out
from al_pipeline.records import LabelIntervention, Selection
from al_pipeline.workspace.workspace import Workspace, open_workspace
from benchmarks.annotators import simulate


def votes(rows: Iterable[tuple[Any, Any, Any]], classes: Sequence[str] = ()) -> Votes:
    """Answers of (item, annotator, label)."""
    answers = [Given(str(item), str(who), None if label is None else str(label), 0) for item, who, label in rows]
    return to_votes(answers, classes)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


KRIPPENDORFF = """
A 1 2 3 3 2 1 4 1 2 . . .
B 1 2 3 3 2 2 4 1 2 5 . 3
C . 3 3 3 2 3 4 2 2 5 1 .
D 1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: any number of observers, missing data."""

FLEISS = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""
"""Fleiss, Measuring nominal scale agreement among many raters (1971), table 1: 30 patients, 6 psychiatrists."""

COHEN = ((88, 10, 2), (14, 40, 6), (18, 10, 12))
"""Cohen, A coefficient of agreement for nominal scales (1960): 200 diagnoses of two psychologists."""


def krippendorff() -> Votes:
    rows = [line.split() for line in KRIPPENDORFF.split("\n") if line]
    return votes((unit, who, label) for who, *labels in rows for unit, label in enumerate(labels) if label != ".")


def fleiss() -> Votes:
    labels = ["".join(str(k) * int(n) for k, n in enumerate(counts)) for counts in FLEISS.split()]
    return votes((item, who, label) for item, given in enumerate(labels) for who, label in enumerate(given))


def cohen() -> Votes:
    cells = [(i, k) for i, row in enumerate(COHEN) for k, count in enumerate(row) for _ in range(count)]
    return votes((item, who, label) for item, pair in enumerate(cells) for who, label in enumerate(pair))


def test_every_pair_has_a_kappa_and_the_largest_have_intervals() -> None:
    given, _ = simulate([0.9] * 25, 3, 3000, overlap=4)
    found = pair_kappas(given, rng(), resamples=50)
    assert len(found) == 300 and all(one.kappa.value is not None for one in found)
    with_interval = [one.items for one in found if one.kappa.low is not None]
    assert len(with_interval) == MOST_INTERVALS
    assert min(with_interval) >= max(one.items for one in found if one.kappa.low is None)


def value(estimate: Estimate) -> float:
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.value


def test_krippendorffs_example() -> None:
    found = agreement(krippendorff(), rng())
    assert (found.items, found.answers) == (11, 40), "the twelfth unit has one value and cannot be paired"
    assert value(found.alpha) == pytest.approx(0.743, abs=5e-4)


def test_fleiss_example() -> None:
    found = agreement(fleiss(), rng())
    assert (found.items, found.raters) == (30, 6)
    assert value(found.kappa) == pytest.approx(0.430, abs=5e-4)
    assert value(found.share) == pytest.approx(0.555, abs=2e-3)


def test_cohens_example() -> None:
    [pair] = pair_kappas(cohen(), rng())
    assert pair.items == 200
    assert value(pair.kappa) == pytest.approx(0.492, abs=5e-4)
    assert pair.kappa.low == pytest.approx(0.39, abs=0.02) and pair.kappa.high == pytest.approx(0.59, abs=0.02)


# Laws --------------------------------------------------------------------------------------------------------------

ANSWERS = st.dictionaries(
    st.tuples(st.integers(0, 11), st.sampled_from("abcd")), st.sampled_from(["x", "y", "z", None]), max_size=40
)


def answers(drawn: dict[tuple[int, str], str | None]) -> list[Given]:
    return [Given(f"i{item:02d}", who, label, item % 3, 2.0 + item) for (item, who), label in drawn.items()]


def figures(found: Quality) -> dict[str, Any]:
    """What does not depend on names."""
    whole = found.agreement
    return {
        "counts": (found.items, found.answers, found.skips, whole.items, whole.answers, whole.raters),
        "values": [one.value for one in (whole.share, whole.alpha, whole.kappa)],
        "reasons": [one.reason for one in (whole.share, whole.alpha, whole.kappa)],
        "pairs": sorted(-9.0 if one.kappa.value is None else round(one.kappa.value, 9) for one in found.pairs),
        "accuracy": sorted(
            -9.0 if one.accuracy.value is None else round(one.accuracy.value, 6) for one in found.people
        ),
        "remarks": sorted(one.kind for one in found.remarks),
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["counts"] == second["counts"] and first["reasons"] == second["reasons"]
    assert first["remarks"] == second["remarks"]
    for name in ("values", "pairs", "accuracy"):
        assert first[name] == pytest.approx(second[name], abs=1e-5), name


@settings(max_examples=60)
@given(ANSWERS, st.permutations("abcd"), st.permutations("xyz"), st.randoms(use_true_random=False))
def test_names_and_order_mean_nothing(drawn: dict[tuple[int, str], str | None], people, classes, shuffle) -> None:
    rows = answers(drawn)
    plain = assess(rows, ("x", "y", "z"))
    shuffle.shuffle(rows)
    assert assess(rows, ("x", "y", "z")) == plain, "the order of answers"
    who, what = dict(zip("abcd", people, strict=True)), dict(zip(["x", "y", "z", None], [*classes, None], strict=True))
    other = [Given(r.item, who[r.annotator], what[r.label], r.round, r.seconds) for r in rows]
    same(figures(assess(other, ("x", "y", "z"))), figures(plain))


def estimates(value: Any) -> Iterable[Estimate]:
    """Every estimate in a result."""
    if isinstance(value, Estimate):
        yield value
    elif hasattr(value, "__struct_fields__"):
        for name in value.__struct_fields__:
            yield from estimates(getattr(value, name))
    elif isinstance(value, tuple):
        for one in value:
            yield from estimates(one)


@settings(max_examples=60)
@given(ANSWERS)
def test_what_is_not_defined_says_why_and_nothing_is_nan(drawn: dict[tuple[int, str], str | None]) -> None:
    found = assess(answers(drawn), ("x", "y"))
    for one in estimates(found):
        assert (one.value is None) == (one.reason is not None)
        numbers = [number for number in (one.value, one.low, one.high) if number is not None]
        assert all(math.isfinite(number) and number <= 1 for number in numbers)
        assert numbers in ([], [one.value]) or one.low <= one.value <= one.high
    whole = found.agreement
    assert whole.items == sum(
        len([1 for (i, _), label in drawn.items() if i == item and label]) > 1 for item in range(12)
    )
    assert (whole.alpha.value is None) == (whole.alpha.reason in (NO_OVERLAP, ONE_CLASS))


@settings(max_examples=30)
@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=12), st.integers(2, 4))
def test_perfect_agreement_is_one(labels: list[str], people: int) -> None:
    found = votes((item, who, label) for item, label in enumerate(labels) for who in range(people))
    whole, pairs = agreement(found, rng()), pair_kappas(found, rng())
    assert whole.share.value == 1
    expected = None if len(set(labels)) == 1 else 1
    assert [whole.alpha.value, whole.kappa.value] == [expected] * 2
    assert [pair.kappa.value for pair in pairs] == [expected] * (people * (people - 1) // 2)
    assert {one.value for one in whole.classes} == {expected}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], NO_OVERLAP),
        ([(1, "a", "x"), (2, "a", "y")], NO_OVERLAP),
        ([(1, "a", "x"), (2, "b", "y")], NO_OVERLAP),
        ([(1, "a", "x"), (1, "b", "x")], ONE_CLASS),
    ],
    ids=["nothing", "one rater", "no overlap", "one class"],
)
def test_what_needs_more_answers(rows: list[tuple[int, str, str]], reason: str) -> None:
    found = assess([Given(str(item), who, label, 0) for item, who, label in rows], ("x", "y"))
    assert found.agreement.alpha.reason == found.agreement.kappa.reason == reason
    assert found.note and not found.remarks
    assert all(one.accuracy.value is None and one.accuracy.reason and not one.confusion for one in found.people)
    found.to_json()


@settings(max_examples=60)
@given(ANSWERS, st.sets(st.sampled_from("abcd"), max_size=3))
def test_the_consensus_of_others(drawn: dict[tuple[int, str], str | None], out: set[str]) -> None:
    found = to_votes(answers(drawn), "xyz").labels
    without = np.array([name in out for name in found.annotators], bool)
    for place, consensus in enumerate(consensus_of_others(found, without)):
        others = [
            int(label)
            for item, who, label in zip(found.item, found.annotator, found.label, strict=True)
            if item == found.item[place] and who != found.annotator[place] and not without[who]
        ]
        most = max((others.count(label) for label in others), default=0)
        leaders = {label for label in others if others.count(label) == most}
        assert consensus == (leaders.pop() if len(leaders) == 1 else SKIP)


def test_idle_time_is_no_work() -> None:
    seconds = [4.0, 5.0, 6.0, 7200.0, -3.0, 0.0, math.nan, None]
    rows = [Given(str(item), "ann", "x", 0, time_) for item, time_ in enumerate(seconds)]
    found = assess(rows, ("x",))
    assert found.cap_seconds == IDLE * 5.5
    [ann] = found.people
    assert ann.seconds == 5.5 and ann.active_seconds == 4 + 5 + 6 + 55
    assert assess([Given("1", "ann", "x", 0)], ("x",)).people[0].seconds is None


def test_an_annotator_answers_an_item_once() -> None:
    with pytest.raises(ValueError, match="two answers"):
        votes([(1, "a", "x"), (1, "a", "y")])


# Error rates ---------------------------------------------------------------------------------------------------------


def test_error_rates_and_accuracies_are_found_without_known_answers() -> None:
    accuracy = (0.95, 0.9, 0.8, 0.6, 0.85)
    found, truth = simulate(accuracy, classes=3, items=3000)
    errors = dawid_skene(found.arrays)
    assert (errors.posteriors.argmax(axis=1) == truth).mean() > 0.93
    for person, expected in enumerate(accuracy):
        assert np.diag(errors.rates[person]) == pytest.approx([expected] * 3, abs=0.05)
        assert accuracies(found, errors)[person].value == pytest.approx(expected, abs=0.03)
    assert errors.priors == pytest.approx([1 / 3] * 3, abs=0.03)


def test_many_items_are_weighed_as_one_by_one() -> None:
    found, _ = simulate((0.9, 0.8, 0.85, 0.7), classes=60, items=1500)
    errors = dawid_skene(found.arrays)
    logs = np.log(errors.priors) + np.zeros_like(errors.posteriors)
    for item, person, label in zip(found.item, found.annotator, found.label, strict=True):
        logs[item] += np.log(errors.rates[person][:, label])
    expected = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
    assert errors.posteriors == pytest.approx(expected, abs=1e-3), "the rates are those of one step later"


@pytest.mark.parametrize("items", [[1] * 200, [3, 1, 7] * 60])
def test_items_drawn_one_by_one_are_resamples_like_a_multinomial_of_their_sets(monkeypatch, items: list[int]) -> None:
    counts = np.array(items)
    both = []
    for items_a_set in (20, 0):
        monkeypatch.setattr("al_pipeline.quality.agreement._ITEMS_A_SET", items_a_set)
        drawn = np.concatenate(list(_draws(counts, np.random.default_rng(5), 4000)))
        assert (drawn.sum(axis=1) == counts.sum()).all() and drawn.shape == (4000, len(items))
        both.append((drawn.mean(axis=0), drawn.std(axis=0)))
    assert both[0][0] == pytest.approx(both[1][0], abs=0.3)
    assert both[0][1] == pytest.approx(both[1][1], abs=0.3)


@pytest.mark.parametrize(("classes", "items"), [(2, 400), (4, 120)])
def test_the_interval_of_an_accuracy_covers_it(classes: int, items: int) -> None:
    covered = 0
    for seed in range(40):
        accuracy = np.random.default_rng(seed).uniform(0.75, 0.97, 6)
        found, truth = simulate(accuracy.tolist(), classes, items, seed=seed)
        right = found.label == truth[found.item]
        for person, one in enumerate(accuracies(found, dawid_skene(found.arrays))):
            given = right[found.annotator == person].mean()
            assert one.low is not None and one.high is not None
            covered += one.low <= given <= one.high
    assert covered / 240 > 0.93, "of the share that is right in these answers"


# Who is named --------------------------------------------------------------------------------------------------------

SIZES = [(20, 2, 0.8), (6, 2, 0.8), (6, 3, 0.95), (20, 5, 0.95)]
"""Annotators, classes, and how often somebody who answers at random must be found within 30 answers."""


@pytest.mark.parametrize(("people", "classes", "power"), SIZES)
def test_who_answers_at_random_is_named_within_thirty_answers_and_hardly_anybody_else(people, classes, power) -> None:
    runs, found, wrong = 1200 // people, 0, 0
    for seed in range(runs):
        accuracy = np.random.default_rng(seed).uniform(0.8, 0.97, people).tolist()
        given, _ = simulate(accuracy, classes, 10 * people, seed=seed, random=[0])
        named = {one.annotator for one in who_stands_out(given).guesses}
        named |= {one.annotator for one in who_stands_out(given).confuses}
        found += 0 in named
        wrong += len(named - {0})
    assert found / runs >= power
    assert wrong / (runs * (people - 1)) <= 0.01


@pytest.mark.parametrize("weakest", [0.7, 0.8])
def test_weak_colleagues_are_not_named_however_much_they_answer(weakest: float) -> None:
    accuracy = np.linspace(weakest, 0.97, 12).tolist()
    named = [who_stands_out(simulate(accuracy, 2, 2000, seed=seed)[0]).guesses for seed in range(5)]
    assert named == [()] * 5


def test_who_confuses_two_classes_is_told_from_who_is_careless() -> None:
    accuracy = np.linspace(0.82, 0.97, 8).tolist()
    caught = 0
    for seed in range(20):
        given, _ = simulate(accuracy, 4, 400, seed=seed, random=[1], confusing=[(0, 2, 3)])
        found = who_stands_out(given)
        assert {one.annotator for one in found.guesses} == {1}
        assert {(one.annotator, one.first, one.second) for one in found.confuses} <= {(0, 2, 3)}
        caught += len(found.confuses)
    assert caught >= 18


def test_always_the_same_class_is_guessing() -> None:
    given, _ = simulate([0.9] * 8, 2, 400, shares=[0.7, 0.3], seed=3)
    given = given._replace(label=np.where(given.annotator == 2, 0, given.label))
    [one] = who_stands_out(given).guesses
    assert one.annotator == 2 and one.agreeing / one.answers > 0.6, "although they mostly agree with the others"
    assert one.chance == pytest.approx(one.agreeing / one.answers)


def test_nobody_is_named_of_two() -> None:
    given, _ = simulate([0.95, 0.95], 3, 300, overlap=2, random=[0])
    found = who_stands_out(given)
    assert found.guesses == () and found.confuses == ()


def test_at_most_half_are_named() -> None:
    given, _ = simulate([0.9] * 7, 4, 400, random=[0, 1, 2, 3, 4])
    assert len(who_stands_out(given).guesses) <= 3


def in_words(given: Votes) -> Quality:
    rows = zip(given.item.tolist(), given.annotator.tolist(), given.label.tolist(), strict=True)
    names, classes = given.annotators, given.classes
    return assess([Given(f"{item:05d}", names[who], classes[label], 0) for item, who, label in rows], classes)


def test_a_confusion_of_all_people_is_told_from_one_of_a_single_person() -> None:
    everybody, _ = simulate([0.92] * 8, 4, 600, confusing=[(person, 0, 1) for person in range(8)])
    found = in_words(everybody)
    worst = found.confusions[0]
    assert (worst.first, worst.second, worst.cause, worst.people) == ("c000", "c001", "guideline", 8)
    single, _ = simulate([0.94] * 8, 4, 600, confusing=[(5, 0, 1)])
    worst = in_words(single).confusions[0]
    assert (worst.first, worst.second, worst.cause, worst.annotators) == ("c000", "c001", "training", ("p005",))
    assert worst.rest.value is not None and worst.rate.value is not None and worst.rest.value < worst.rate.value / 2


def test_the_evidence_is_in_words() -> None:
    given, _ = simulate([0.92] * 8, 4, 600, random=[3], confusing=[(5, 0, 1)], seed=1)
    guess, confusion = in_words(given).remarks
    assert (guess.annotator, guess.kind, confusion.annotator, confusion.kind) == ("p003", "guesses", "p005", "confuses")
    assert "agrees with the others in" in guess.evidence and "colleague would agree in" in guess.evidence
    assert confusion.classes == ("c000", "c001") and "that the others call c001" in confusion.evidence


# Speed and other libraries -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_thousand_answers_take_seconds() -> None:
    given, _ = simulate(np.linspace(0.8, 0.97, 20).tolist(), 20, 33_334, random=[0], confusing=[(1, 3, 4)])
    rows = zip(given.item.tolist(), given.annotator.tolist(), given.label.tolist(), strict=True)
    answered = [Given(f"i{item}", f"p{who}", f"c{label}", item // 3000, 5.0) for item, who, label in rows]
    before = time.process_time()
    found = assess(answered, given.classes)
    assert time.process_time() - before < 5 and found.answers == 100_002
    assert [one.annotator for one in found.remarks] == ["p0", "p1"]


@pytest.fixture(scope="module")
def inter_rater() -> Any:
    reason = "!! NOT TESTED: statsmodels is not installed; `make setup` installs it"
    return pytest.importorskip("statsmodels.stats.inter_rater", reason=reason)


@pytest.mark.slow
def test_statsmodels_has_the_same_kappas(inter_rater: Any) -> None:
    given, _ = simulate([0.9, 0.7, 0.8], 4, 120)
    table = np.zeros((120, 4))
    np.add.at(table, (given.item, given.label), 1)
    assert agreement(given, rng()).kappa.value == pytest.approx(inter_rater.fleiss_kappa(table))
    labels = given.label.reshape(-1, 3)
    for pair in pair_kappas(given, rng()):
        cells = np.zeros((4, 4))
        np.add.at(cells, (labels[:, pair.first], labels[:, pair.second]), 1)
        theirs = inter_rater.cohens_kappa(cells)
        assert pair.kappa.value == pytest.approx(theirs.kappa)
        assert [pair.kappa.low, pair.kappa.high] == pytest.approx([theirs.kappa_low, theirs.kappa_upp], abs=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The (inplace|copy) keyword")  # of pandas, about crowd-kit
def test_crowd_kit_finds_the_same_error_rates() -> None:
    reason = "!! NOT TESTED: crowd-kit is not installed; `make setup` installs it"
    crowdkit = pytest.importorskip("crowdkit.aggregation.classification.dawid_skene", reason=reason)
    import pandas as pd

    given, _ = simulate([0.95, 0.6, 0.8, 0.9, 0.85], 3, 500)
    table = pd.DataFrame({"task": given.item, "worker": given.annotator, "label": given.label})
    theirs = crowdkit.DawidSkene(n_iter=200, tol=0).fit(table)
    ours = dawid_skene(given.arrays, prior=0.0)
    proba = theirs.probas_.sort_index()[[0, 1, 2]].to_numpy()
    assert np.abs(proba - ours.posteriors).mean() < 1e-3
    errors = theirs.errors_  # rows: worker and label given; columns: true class
    for person in range(5):
        rates = errors.loc[person].reindex([0, 1, 2]).fillna(0)[[0, 1, 2]].to_numpy().T
        assert np.abs(rates - ours.rates[person]).max() < 1e-2


# A workspace ---------------------------------------------------------------------------------------------------------

PEOPLE = tuple(f"{name}@example.org" for name in ("ann", "bob", "cid", "dan", "eve[/]\x1b[31m"))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    """One published round of 40 pool items; three of five people answer each task, the last person at random."""
    changes = {"overlap: 1": "overlap: 3", "test_size: 12": "test_size: 10", "seed_size: 10": "seed_size: 40"}
    workspace, truth = small_workspace(tmp_path_factory.mktemp("judged"), changes=changes)
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle)
    for number, key in enumerate(oracle.queue(PEOPLE[0])):
        right = truth[key.rsplit(":", 1)[1]]
        for place in range(3):
            who = PEOPLE[(number + place) % 5]
            oracle.answer(key, who, right if who != PEOPLE[-1] else ("ham", "spam")[number // 5 % 2])
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (0,)
    return open_workspace(workspace.layout.root), oracle, truth


def al(workspace: Workspace, *words: str) -> Any:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, ["-C", str(workspace.layout.root), *words])


@pytest.mark.slow
def test_the_quality_of_a_workspace(judged: tuple[Workspace, SimulatedOracle, dict[str, str]]) -> None:
    workspace, _, truth = judged
    found = quality(workspace)
    events = [event for event in read_events(workspace.layout.events) if event.type == "label"]
    assert (found.answers, found.items, found.shared, found.skips) == (len(events), 50, 50, 0)
    assert [one.name for one in found.people] == sorted(PEOPLE)
    for one in found.people:
        mine = [event for event in events if event.annotator == one.name]
        assert one.answers == len(mine) == 30 and one.seconds == 1.0
        right = sum(event.label == truth[event.item_id] for event in mine)
        if one.name != PEOPLE[-1]:
            assert right == 30 and one.agreement.value == 1.0
        assert one.accuracy.value == pytest.approx(right / 30, abs=0.08)
    assert [(one.annotator, one.kind) for one in found.remarks] == [(PEOPLE[-1], "guesses")]
    data = report_data(workspace, 0)
    assert data.quality == quality(workspace, 0) == found


@pytest.mark.slow
def test_the_command(judged: tuple[Workspace, SimulatedOracle, dict[str, str]]) -> None:
    workspace, _, _ = judged
    shown, told = al(workspace, "quality"), json.loads(al(workspace, "quality", "--json").stdout)
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and "eve[/] [31m@example.org" in shown.stdout
    assert told["agreement"]["alpha"]["value"] == quality(workspace).agreement.alpha.value
    assert [one["annotator"] for one in told["remarks"]] == [PEOPLE[-1]]
    assert f"{told['agreement']['alpha']['value']:.2f}" in shown.stdout
    other = al(workspace, "quality", "--round", "7")
    assert isinstance(other.exception, NothingToDo) and "round-0007" in str(other.exception)


@pytest.mark.slow
def test_what_does_not_count_is_not_measured(
    judged: tuple[Workspace, SimulatedOracle, dict[str, str]], tmp_path: Path
) -> None:
    """A revoked annotator, skips, edits, imports and adjudications, on the events of the fold."""
    workspace, _, _ = judged
    events = read_events(workspace.layout.events)
    first = events[0]
    revoked = LabelIntervention("revoke", selection=Selection(annotator=PEOPLE[-1]))
    more = [
        replace(
            first, event_id="q", type="quarantine", annotation_key="intervention:1", label=None, intervention=revoked
        ),
        replace(first, event_id="i", type="import", annotator="import", annotation_key="import:x", label="spam"),
        replace(first, event_id="j", type="adjudicate", annotator="boss", annotation_key="adj#1", label="spam"),
        replace(first, event_id="e", type="supersede", lead_time=9.0),
        replace(
            first,
            event_id="s",
            type="skip",
            item_id=events[-1].item_id,
            annotator="new",
            annotation_key="z#1",
            label=None,
        ),
    ]
    found = quality_of(active([*events, *more]), ("ham", "spam"))
    people = {one.name: one for one in found.people}
    assert people.keys() == {*PEOPLE[:-1], "new"}
    assert (people["new"].answers, people["new"].skips) == (0, 1)
    assert people[first.annotator].active_seconds == 29 + 9, "an edit adds to the time of its answer"
    assert quality_of([], ("ham", "spam")).agreement.alpha.reason == NO_OVERLAP


@pytest.mark.server
@pytest.mark.slow
def test_two_people_in_a_real_label_studio(label_studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with their own token, as their browsers would: who said what, and how long it took."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    changes = {"overlap: 1": "overlap: 2", "test_size: 12": "test_size: 0", "seed_size: 10": "seed_size: 12"}
    workspace, truth = small_workspace(tmp_path, 30, changes)
    assert tick(workspace, lambda: connect(workspace)).round == 0
    project = read_json(workspace.layout.project)["project_id"]
    people = [f"{name}.quality@example.com" for name in ("ann", "bob")]
    said: dict[tuple[str, str], str] = {}
    for person, who in enumerate(people):
        login = {"Authorization": f"Token {label_studio.invite(who)}"}
        with httpx.Client(base_url=label_studio.url, headers=login, timeout=60, trust_env=False) as http:
            rows = http.get("/api/tasks", params={"project": project, "page_size": 100}).json()["tasks"]
            for number, row in enumerate(sorted(rows, key=lambda row: row["id"])):
                label = truth[row["data"]["item_id"]]
                if person and number % 4 == 0:
                    label = "ham" if label == "spam" else "spam"
                said[who, row["data"]["item_id"]] = label
                content = {"result": choice_result(label), "lead_time": 600.0 if number == 3 else 4.0 + person}
                http.post(f"/api/tasks/{row['id']}/annotations/", json=content).raise_for_status()
    tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
    leave(label_studio, workspace)
    found = quality(workspace)
    assert (found.answers, found.shared) == (24, 12) and [one.name for one in found.people] == people
    assert [one.seconds for one in found.people] == [4.0, 5.0] and found.cap_seconds == IDLE * 5
    assert [one.active_seconds for one in found.people] == [44 + found.cap_seconds, 55 + found.cap_seconds]
    mine, theirs = ([said[who, item] for who, item in sorted(said) if who == one] for one in people)
    equal = np.mean([a == b for a, b in zip(mine, theirs, strict=True)])
    chance = sum(mine.count(label) * theirs.count(label) for label in ("ham", "spam")) / 144
    [pair] = found.pairs
    assert equal == 0.75 and pair.kappa.value == pytest.approx((equal - chance) / (1 - chance))
    assert found.remarks == () and found.note.startswith("fewer than three people")
    assert [one.accuracy.reason for one in found.people] == ["fewer than three people share items"] * 2
