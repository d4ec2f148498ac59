"""Simulations: what a project would have asked, told without a project; whole runs, kept, gone on with, compared."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import SMALL, change_params, play, write_pool
from msgspec import structs

from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import BadInput, UsageError
from al_pipeline.features.vectors import guide_vectors
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.report import write_report
from al_pipeline.operations.status import status
from al_pipeline.params import AnswerCost, Params, parse_params
from al_pipeline.records import RANDOM_SLICE, PlannedTask, content_hash
from al_pipeline.simulation.corpus import LabeledTexts, read_corpus
from al_pipeline.simulation.hours import answer_seconds, same_seconds
from al_pipeline.simulation.page import hours_table, render, summary
from al_pipeline.simulation.replay import Curve
from al_pipeline.simulation.runs import FULL, Work, group_runs, prepare, read_run, run_all, run_file, simulate_run
from al_pipeline.simulation.simulate import Options, Simulation, corpus_vectors, simulate, with_features
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import LAYOUT_VERSION, open_workspace

WORDS = ("agenda", "report", "lunch", "call", "minutes", "friday", "please", "team", "draft", "notes")


def write_corpus(path: Path, texts: int = 240, share: float = 0.3, seed: int = 3) -> Path:
    """A CSV of little mails; `win` and `cheap` tell spam most of the time."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label", "other"])
        for number in range(texts):
            spam = draw.random() < share
            words = [
                *draw.choices(WORDS, k=6),
                draw.choice(("win", "cheap") if spam != (draw.random() < 0.1) else WORDS),
            ]
            out.writerow([f"{' '.join(words)} {number}", "spam" if spam else "ham", number])
    return path


@pytest.fixture
def texts(tmp_path: Path) -> LabeledTexts:
    return read_corpus(write_corpus(tmp_path / "mails.csv"))


def params() -> Params:
    return with_features(parse_params(template("params.yaml")), "tfidf")


def run(texts: LabeledTexts, out: Path, **other: Any) -> Simulation:
    options = {"seeds": 2, "budget": 60, "batch_size": 20, "seed_size": 20, **other}
    return simulate(texts, "mails", params(), Options(**options), out, None)


def work_of(texts: LabeledTexts, **other: Any) -> Work:
    return Work(texts, None, True, True, QueryConfig(1, 20, "margin", 20, 0.1, 100, **other), 2, 48)


# The corpus ---------------------------------------------------------------------------------------------------------
def test_rows_become_texts_once_each_and_contradictions_go(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(60)]
    rows += [{"text": " text 1 ", "label": "b"}, {"text": "text 2", "label": "b"}, {"text": "", "label": "a"}]
    rows += [{"text": "unlabelled", "label": None}, {"text": "number", "label": 7}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    found = read_corpus(path)
    assert {item.text for item in found.items} == {f"text {n}" for n in range(60) if n != 2} | {"number"}
    assert found.counts == {"7": 1, "a": 29, "b": 30}
    assert sum(found.left_out.values()) == 6
    assert [item.item_id for item in found.items] == sorted(content_hash(item.text)[:20] for item in found.items)


def test_neither_order_nor_form_of_the_file_matters(tmp_path: Path, texts: LabeledTexts) -> None:
    lines = (tmp_path / "mails.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    turned = read_corpus(tmp_path / "turned.csv")
    assert turned.digest == texts.digest and turned.items == texts.items
    other = replace(texts, truth=texts.truth[::-1].copy())
    assert other.digest != texts.digest


@pytest.mark.parametrize("how", ["encoding", "stdin", "folder", "gzip", "xlsx", "sep="])
def test_a_corpus_is_read_as_ingest_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    rows = [(f"café {number}", "ab"[number % 3 == 0]) for number in range(60)]
    plain = "".join(f"{text};{label}\n" for text, label in [("text", "label"), *rows])
    file = tmp_path / "a.csv"
    file.write_text(plain, encoding="utf-8")
    expected = read_corpus(file)
    path, options = file, dict[str, Any]()
    match how:
        case "encoding":
            file.write_bytes(plain.encode("iso8859-15"))  # not detected from so little
            options = {"encoding": "iso8859-15"}
        case "stdin":
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain.encode())))
            path, options = Path("-"), {"format": "csv"}
        case "folder":
            path = tmp_path / "in"
            path.mkdir()
            lines = plain.splitlines(keepends=True)
            (path / "a.csv").write_text("".join(lines[:31]), encoding="utf-8")
            rest = ({"text": text, "label": label} for text, label in rows[30:])
            (path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest), encoding="utf-8")
        case "gzip":
            file.write_bytes(gzip.compress(plain.encode(), mtime=0))
        case "xlsx":
            book = openpyxl.Workbook()
            for row in [("text", "label"), *rows]:
                book.active.append(row)
            path = tmp_path / "a.xlsx"
            book.save(path)
        case _:
            file.write_text(f"sep=;\n{plain}", encoding="utf-8")
    found = read_corpus(path, **options)
    assert found.counts == expected.counts == {"a": 40, "b": 20} and found.left_out == {}
    assert found.items == expected.items and found.digest == expected.digest


def test_of_a_large_corpus_a_random_sample_is_taken(tmp_path: Path, texts: LabeledTexts) -> None:
    few = read_corpus(tmp_path / "mails.csv", limit=100, seed=1)
    assert len(few.items) == 100 and set(few.items) < set(texts.items)
    assert few.items != read_corpus(tmp_path / "mails.csv", limit=100, seed=2).items
    assert list(few.left_out.values()) == [140]


def test_classes_come_in_the_schemas_order_where_it_names_them_all(tmp_path: Path, texts: LabeledTexts) -> None:
    path = tmp_path / "mails.csv"
    assert texts.classes == ("ham", "spam") and texts.positive == "spam"
    assert read_corpus(path, schema=("spam", "ham")).classes == ("spam", "ham")
    assert read_corpus(path, schema=("spam", "eggs")).classes == ("ham", "spam")
    assert replace(texts, classes=("a", "b", "c")).positive is None


def test_a_corpus_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has 20 different labelled texts"):
        read_corpus(write_corpus(tmp_path / "few.csv", 20))
    with pytest.raises(BadInput, match="every label in `label` is 'ham'"):
        read_corpus(write_corpus(tmp_path / "one.csv", 80, share=-1))
    with pytest.raises(BadInput, match="240 different values.*--label-column"):
        read_corpus(write_corpus(tmp_path / "ids.csv"), label_column="other")
    with pytest.raises(BadInput, match="has no column `tag`"):
        read_corpus(write_corpus(tmp_path / "c.csv"), label_column="tag")


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        (7, "7"),
        (7.0, "7"),
        (" ham ", "ham"),
        (unicodedata.normalize("NFC", "Café"), "Café"),
        (unicodedata.normalize("NFD", "Café"), "Café"),
        ("x" * 100, "x" * 100),
        ("x" * 101, None),
        ("a\x07b", None),
        ("a\tb", None),
        ("a\nb", None),
        ("\ud800", None),
        (1.5, None),
        (True, None),
        (["ham"], None),
        ({"a": 1}, None),
        (10**300, None),
        ("", None),
        (" ", None),
        (None, None),
    ],
)
def test_a_label_is_taken_where_ingest_takes_it(tmp_path: Path, cell: Any, label: str | None) -> None:
    path = tmp_path / "c.jsonl"
    rows = [{"text": f"text {n}", "label": ("ham", "spam")[n % 2]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "this one", "label": cell}]))
    found = read_corpus(path)
    taken = {item.text: found.classes[place] for item, place in zip(found.items, found.truth, strict=True)}
    assert taken.get("this one") == label
    assert sum(found.left_out.values()) == (label is None)

    text = template("params.yaml").replace("test_size: 500", "test_size: 0")
    if isinstance(cell, str) and cell.strip():  # as the user would write it into the schema
        text = text.replace("- ham", f"- ham\n    - {json.dumps(cell.strip())}" if cell.strip() != "ham" else "- ham")
    elif label is not None:
        text = text.replace("- ham", f'- ham\n    - "{label}"')
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "al-workspace.json").write_text(f'{{"layout": {LAYOUT_VERSION}, "workspace_id": "0123456789ab"}}')
    try:
        space = open_workspace(tmp_path)
        assert space.params.schema_.labels
    except UsageError:
        assert label is None, "what params.yaml refuses is no class for simulate either"
        return
    ingest(space, [path], label_column="label")
    events = {event.item_id: event.label for event in read_events(space.layout.inbox_events)}
    assert events.get(content_hash("this one")[:20]) == label


def test_whole_numbers_that_pandas_made_floats_are_classes(tmp_path: Path) -> None:
    labels = [float(n % 2) if n < 60 else None for n in range(61)]
    frame = {"id": [float(n) for n in range(61)], "text": [f"text {n}" for n in range(61)], "label": labels}
    pq.write_table(pa.table(frame), tmp_path / "c.parquet")
    found = read_corpus(tmp_path / "c.parquet")
    assert (found.classes, found.left_out) == (("0", "1"), {"no label": 1})


def test_a_text_is_taken_where_ingest_takes_it(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": ("ham", "spam")[n % 2]} for n in range(60)]
    odd: list[Any] = ["\ud800", "x" * 200_001, 7, None, " ", ["a"], unicodedata.normalize("NFD", "é 1")]
    odd.append(unicodedata.normalize("NFC", "é 1"))
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *({"text": t, "label": "ham"} for t in odd)]))
    found = read_corpus(path)
    (tmp_path / "params.yaml").write_text(template("params.yaml").replace("test_size: 500", "test_size: 0"))
    (tmp_path / "al-workspace.json").write_text(f'{{"layout": {LAYOUT_VERSION}, "workspace_id": "0123456789ab"}}')
    report = ingest(open_workspace(tmp_path), [path], label_column="label")
    assert len(found.items) == report.added == 61
    assert sum(found.left_out.values()) == sum(report.rejected.values()) + report.duplicates == 7


# Runs ---------------------------------------------------------------------------------------------------------------
def test_arms_of_a_seed_share_test_set_and_seed_round_and_no_two_seeds_do(texts: LabeledTexts) -> None:
    work = work_of(texts)
    one, two = prepare(work, 1), prepare(work, 2)
    assert set(one.corpus.test) != set(two.corpus.test)
    assert len(one.corpus.test) == 48 and len(one.corpus.pool) == 192
    curves = [simulate_run(work, one, arm, 1) for arm in ("random", "margin")]
    assert curves[0].points[0] == curves[1].points[0]
    assert curves[0].points[1].queries != curves[1].points[1].queries


def test_the_vocabulary_knows_nothing_of_the_test_set(texts: LabeledTexts) -> None:
    work = work_of(texts)
    test = set(prepare(work, 1).corpus.test.tolist())
    marked = tuple(
        structs.replace(item, text=f"{item.text} zzz") if number in test else item
        for number, item in enumerate(texts.items)
    )
    before, after = prepare(work, 1), prepare(replace(work, texts=replace(texts, items=marked)), 1)
    assert before.matrix.widths == after.matrix.widths


@pytest.mark.slow
def test_what_is_finished_is_kept_and_what_is_missing_is_done(texts: LabeledTexts, tmp_path: Path) -> None:
    first = run(texts, tmp_path / "out")
    assert first.done == 6  # two strategies and all labels, two seeds
    again = run(texts, tmp_path / "out")
    assert again.done == 0 and again.result == first.result and again.folder == first.folder
    lost = run_file(first.folder, ("margin", 20260102))
    kept = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir() if path != lost}
    lost.unlink()
    repaired = run(texts, tmp_path / "out")
    assert repaired.done == 1
    assert {key: value for key, value in repaired.result.items() if key != "seconds"} == {
        key: value for key, value in first.result.items() if key != "seconds"
    }
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run(texts, tmp_path / "out", strategies=("entropy",), seeds=3).done == 5


@pytest.mark.slow
def test_other_texts_or_settings_are_another_simulation(texts: LabeledTexts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folders = [run(texts, out, seeds=1, **other).folder for other in ({}, {"budget": 80}, {"batch_size": 10})]
    folders.append(run(replace(texts, truth=1 - texts.truth), out, seeds=1).folder)
    assert len(set(folders)) == 4


@pytest.mark.slow
def test_an_estimator_of_ones_own_is_played_and_a_fine_tuned_model_stood_in_for(
    texts: LabeledTexts, tmp_path: Path
) -> None:
    """The head's figures, with a warning, where training a transformer in every round would take for ever."""

    def played(model: str) -> Simulation:
        other = structs.replace(params(), train=structs.replace(params().train, model=model))
        options = Options(strategies=("random",), seeds=1, budget=40, batch_size=20, seed_size=20)
        return simulate(texts, "mails", other, options, tmp_path / "out", None)

    head, own, tuned = played("head"), played("centroid"), played("finetuned")
    assert tuned.folder == head.folder != own.folder
    assert "the linear head on frozen features" in tuned.result["warnings"][0]
    assert tuned.result["metrics"] == head.result["metrics"] != own.result["metrics"]
    assert not [warning for warning in own.result["warnings"] if "linear head" in warning]


@pytest.mark.slow
def test_processes_give_what_one_process_gives(texts: LabeledTexts, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    work, runs = work_of(texts), [(arm, seed) for seed in (1, 2) for arm in (FULL, "random", "margin")]
    assert run_all(work, runs, tmp_path / "one", 1, lambda *done: told.append(done)) == 6
    assert run_all(work, runs, tmp_path / "two", 2, lambda *done: told.append(done)) == 6
    for each in runs:
        one, two = read_run(tmp_path / "one", each), read_run(tmp_path / "two", each)
        assert one is not None and two is not None
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
    total = told[0][1]
    assert told[0] == (0, total) and (total, total) in told
    assert all(done <= whole == total for done, whole in told)


def test_runs_of_a_seed_go_together_but_no_worker_idles() -> None:
    runs = [(arm, seed) for seed in range(3) for arm in "abc"]
    assert group_runs(runs, 2) == [[(arm, seed) for arm in "abc"] for seed in range(3)]
    apart = group_runs(runs[:3], 2)
    assert len(apart) == 2 and sorted(sum(apart, [])) == runs[:3]
    assert group_runs([], 4) == []


@pytest.mark.slow
def test_a_guide_finds_the_rare_class_sooner_and_leaves_random_alone(tmp_path: Path) -> None:
    texts = read_corpus(write_corpus(tmp_path / "rare.csv", 600, share=0.05))
    plain = run(texts, tmp_path / "out", budget=40, seeds=4).result
    guided = run(texts, tmp_path / "out", budget=40, seeds=4, guide={"spam": ["win", "cheap"]}).result
    assert guided["found"]["margin"]["spam"][0] > plain["found"]["margin"]["spam"][0] + 2
    assert guided["found"]["random"] == plain["found"]["random"]
    with pytest.raises(UsageError, match="the guide names 'eggs', but the classes of the corpus are ham, spam"):
        run(texts, tmp_path / "out", guide={"eggs": ["x"]})


def test_arms_with_a_cold_start_of_their_own_leave_random_alone(texts: LabeledTexts) -> None:
    dense = np.random.default_rng(0).normal(size=(240, 6)).astype(np.float32)
    work = replace(work_of(texts, cold_start="kmeans"), dense=dense)
    prepared = prepare(work, 1)
    random, margin = (simulate_run(work, prepared, arm, 1) for arm in ("random", "margin"))
    assert {query.strategy for query in margin.points[0].queries} == {"kmeans", RANDOM_SLICE}
    assert {query.strategy for query in random.points[0].queries} == {"random", RANDOM_SLICE}


@pytest.mark.slow
def test_killed_anywhere_it_leaves_whole_runs_and_nobody_running(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "mails.csv", 600)
    command = [sys.executable, "-m", "al_pipeline.cli.app", "simulate", str(corpus), "--features", "tfidf", "--json"]
    command += ["--seeds", "4", "--budget", "200", "--workers", "2", "--out", str(tmp_path / "out")]
    command += ["--strategies", "random,margin"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as one:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/*/runs/[!.]*.json")):
            assert time.monotonic() < deadline and one.poll() is None
            time.sleep(0.05)
        one.send_signal(signal.SIGKILL)
    for _ in range(200):
        if not _alive(one.pid):
            break
        time.sleep(0.1)
    assert not _alive(one.pid), "workers end with their parent"
    kept = {path: path.read_bytes() for path in tmp_path.glob("out/*/runs/[!.]*.json")}
    assert 0 < len(kept) < 12 and all(json.loads(data) for data in kept.values())
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout)["savings"]["margin"].keys() == {"90", "95", "98"}
    assert len(list(tmp_path.glob("out/*/runs/[!.]*.json"))) == 12
    assert {path: path.read_bytes() for path in kept} == kept


def _alive(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[3] == str(session) and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


# The same questions as a project's ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "cold", "kind"),
    [
        ("margin", "random", "tfidf"),
        ("class_balanced", "random", "tfidf"),
        ("auto", "typiclust", "encoder+tfidf"),
        ("bald", "random", "tfidf"),
        ("vote_entropy", "random", "tfidf"),
    ],
)
@pytest.mark.timeout(1800)
def test_simulated_rounds_ask_what_the_stages_ask(tmp_path: Path, strategy: str, cold: str, kind: str) -> None:
    """Same seed, same pool: item by item, with places, probabilities and scores, in the seed round and two more."""
    changes = {"cold_start: random": f"cold_start: {cold}"} if cold != "random" else {}
    if strategy != "margin":
        changes["guide: {}"] = "guide: {spam: [free offer, claim your prize]}"
    if kind != "tfidf":
        changes["kind: tfidf"] = f"kind: {kind}"
    if strategy != "auto":
        changes["strategy: auto"] = f"strategy: {strategy}"
    workspace, truth = _project_without_ids(tmp_path, changes)
    play(workspace, SimulatedOracle(), truth, 2)
    workspace = open_workspace(workspace.layout.root)
    plans = [
        sorted(
            (task for task in read_plan(Git(workspace.layout.root), number) if task.part == "pool"),
            key=lambda task: task.rank,
        )
        for number in range(3)
    ]

    texts = read_corpus(tmp_path / "labelled.jsonl", schema=workspace.params.schema_.labels)
    asked = workspace.params
    vectors = corpus_vectors(texts, asked.features, tmp_path / "home", workspace.layout)
    knobs = structs.asdict(asked.select)
    work = Work(
        texts,
        None if vectors is None else vectors.of(texts.items),
        asked.features.uses_tfidf,
        asked.train.calibrate,
        QueryConfig(asked.seed, asked.round.seed_size, **knobs),
        2,
        asked.ingest.test_size,
        {name: guide_vectors(vectors, phrases) for name, phrases in asked.select.guide.items()},
    )
    curve = simulate_run(work, prepare(work, asked.seed), strategy, asked.seed)
    for plan, point in zip(plans, curve.points, strict=True):
        # Test items stand between the pool's: what a simulated round has is the order of the pool's alone.
        there = [(task.item_id, place, task.strategy, task.probability) for place, task in enumerate(plan)]
        assert [(q.item_id, q.rank, q.strategy, q.probability) for q in point.queries] == there
        if point is not curve.points[0]:  # there the stages' prior model scores everything the same
            assert [q.score for q in point.queries] == pytest.approx([t.score for t in plan], abs=1e-6)
    recorded = [json.loads(workspace.layout.choice.read_text())["strategy"]]
    assert recorded == [curve.points[2].choice.strategy] or strategy == "auto"
    _check_the_record(workspace, plans, truth, curve)
    macro_f1 = json.loads(workspace.layout.metrics.read_text())["macro_f1"]["value"]
    assert curve.points[1].metrics.macro_f1.value == pytest.approx(macro_f1)


def _check_the_record(workspace: Any, plans: list[list[PlannedTask]], truth: dict[str, str], curve: Curve) -> None:
    """What the last record says of the random slice and of the random labels."""
    record = json.loads(workspace.layout.record(1).read_text())
    assert {task.predicted for task in plans[0]} == {None}, "the prior knows nothing"
    assert all(task.predicted in ("ham", "spam") and 0.5 <= task.confidence < 1 for task in plans[1])
    drawn = [task for task in plans[1] if task.strategy == RANDOM_SLICE]
    whole = record["running"]["whole"]
    assert (whole["asked"], whole["answered"]) == (len(drawn), len(drawn)) and drawn
    assert whole["right"] == sum(task.predicted == truth[task.item_id] for task in drawn)
    random_labels = [q for point in curve.points[:2] for q in point.queries if q.strategy in ("random", RANDOM_SLICE)]
    assert record["control"]["labels"] == len(random_labels)
    shown = status(workspace)
    assert shown.running.to_row() == record["running"] and shown.saved.random_labels == len(random_labels)
    page = write_report(workspace).read_text(encoding="utf-8")
    assert shown.saved.sentence() in page and "Running accuracy" in page
    if not plans[0][0].strategy.startswith("random"):
        return
    genesis_control = json.loads(Git(workspace.layout.root).show("round-0000", "rounds/control.json") or "null")
    first = json.loads(workspace.layout.record(0).read_text())["metrics"]["macro_f1"]["value"]
    assert genesis_control["macro_f1"]["value"] == first, "after a random seed round the control is the model"


def _project_without_ids(folder: Path, changes: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """A small workspace whose items have the ids of their content, as a simulation's have, and its labelled corpus."""
    folder.mkdir(exist_ok=True)
    labels = write_pool(folder / "raw.jsonl", 80)
    rows = [json.loads(line) for line in (folder / "raw.jsonl").read_text(encoding="utf-8").splitlines()]
    truth = {content_hash(row["text"])[:20]: labels[row["id"]] for row in rows}
    (folder / "labelled.jsonl").write_text(
        "".join(json.dumps({"text": row["text"], "label": labels[row["id"]]}) + "\n" for row in rows), encoding="utf-8"
    )
    workspace = init(folder / "workspace", ["ham", "spam"], remote=str(folder / "remote"))
    change_params(workspace, {**SMALL, **changes})
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [folder / "labelled.jsonl"])
    return workspace, truth


# What comes out -----------------------------------------------------------------------------------------------------
@pytest.fixture
def done(texts: LabeledTexts, tmp_path: Path) -> Iterator[Simulation]:
    yield run(texts, tmp_path / "out", strategies=("margin", "entropy"))


def test_the_result_has_every_figure_for_every_strategy(done: Simulation) -> None:
    result = json.loads((done.folder / "result.json").read_text(encoding="utf-8"))
    assert result == json.loads(json.dumps(done.result))
    assert result["strategies"] == ["random", "margin", "entropy"] and result["budgets"] == [20, 40, 60]
    for arm in result["strategies"]:
        low, high = result["area_interval"][arm]
        assert low <= result["area"][arm] <= high
        for share in ("90", "95", "98"):
            saving, interval = result["savings"][arm][share], result["savings_interval"][arm][share]
            assert len(interval) == 2
            assert saving is None or saving > 0
    assert all(value in (None, 1.0) for value in result["savings"]["random"].values())
    assert result["metric"] == "average_precision" and set(result["metrics"]) == {"average_precision", "macro_f1"}
    assert result["metrics"]["macro_f1"]["wins"]["margin"].keys() == {"random", "entropy"}
    assert result["corpus"]["texts"] == 240 and result["corpus"]["test"] == 48
    assert any("few test items of spam" in warning for warning in result["warnings"])
    assert {sum(found[label][-1] for label in found) for found in result["found"].values()} == {60.0}


def test_what_the_model_may_label_at_the_end_is_told(texts: LabeledTexts, tmp_path: Path) -> None:
    result = run(texts, tmp_path, strategies=("margin",), finish=0.4).result
    found = result["finish"]
    assert found["bound"] == 0.4 and found["arms"].keys() == {"random", "margin"}
    for one in found["arms"].values():
        assert one["runs"] == 2 and 0 <= one["holds"] <= 2
        assert 0 <= one["share"][0] <= 1
        assert one["error"] is None or one["error"] <= one["worst"] <= 1
    assert found["arms"]["margin"]["share"][0] > 0
    assert any("the model may label" in sentence for sentence in summary(result))
    assert "finish" not in run(texts, tmp_path, strategies=("margin",)).result
    with pytest.raises(UsageError, match="--finish takes an error rate"):
        run(texts, tmp_path, finish=1.0)


def test_savings_are_told_in_hours_where_the_time_of_an_answer_is_known(texts: LabeledTexts, tmp_path: Path) -> None:
    found = run(texts, tmp_path / "out", strategies=("margin",), budget=140, cost=same_seconds(36.0))
    plain, hours = found.result["metrics"][found.result["metric"]], found.result["hours"]
    assert hours["answer_seconds"] == pytest.approx(36.0)
    reached = {share: labels for share, labels in plain["labels_needed"]["margin"].items() if labels is not None}
    assert reached
    for share, labels in reached.items():
        assert hours["needed"]["margin"][share] == pytest.approx(labels / 100, rel=0.05), "100 answers an hour"
    assert "hours of answering" in summary(found.result)[0]
    name, header, rows = hours_table(found.result) or ("", (), [])
    assert "36.0 s" in name and [row[0] for row in rows] == ["random", "margin"] and len(header) == len(rows[0])
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "Hours of answering" in page
    again = run(texts, tmp_path / "out", strategies=("margin",), budget=140)
    assert again.done == 0 and "hours" not in again.result, "another time of an answer computes no run anew"
    slow = AnswerCost(base=2.0, slope=1.0, length=3.0, shortest=0.0, longest=9.0, classes={"spam": 1.0})
    each = answer_seconds(texts, slow)
    assert each[texts.truth == texts.classes.index("spam")].mean() > each.mean() and len(each) == len(texts.items)


def test_three_classes_are_told_by_macro_f1_alone(texts: LabeledTexts, tmp_path: Path) -> None:
    truth = np.where(np.arange(240) % 3 == 0, 2, texts.truth)
    result = run(replace(texts, truth=truth, classes=("ham", "spam", "eggs")), tmp_path, seeds=1).result
    assert result["metric"] == "macro_f1" and set(result["metrics"]) == {"macro_f1"}


def test_pictures_and_page_stand_alone(done: Simulation) -> None:
    for name in ("macro-f1.png", "average-precision.png"):
        assert (done.folder / name).read_bytes().startswith(b"\x89PNG")
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page), "nothing is loaded"
    assert "<script" not in page and page.count("<svg") == 4
    for arm in ("random", "margin", "entropy"):
        assert f">{arm}</th>" in page
    assert render(done.result) == page


def test_the_page_escapes_what_came_from_the_user(done: Simulation) -> None:
    wicked = "<script>alert(1)</script>"
    corpus = {**done.result["corpus"], "name": wicked, "classes": {wicked: 1, "spam": 2}}
    found = {arm: {wicked: [1.0], "spam": [1.0]} for arm in done.result["strategies"]}
    page = render({**done.result, "corpus": corpus, "found": found, "positive": wicked})
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3


def test_the_summary_says_what_was_reached_and_what_was_not(done: Simulation) -> None:
    row = done.result["metrics"]["average_precision"]
    needed = {"random": {"90": 100.0, "95": None, "98": None}, "margin": {"90": 50.0, "95": 80.0, "98": None}}
    needed["entropy"] = dict.fromkeys(("90", "95", "98"))
    changed = {
        **row,
        "labels_needed": needed,
        "savings": {"margin": {"90": 2.0, "95": None}},
        "savings_at_least": {"margin": {"90": None, "95": 1.25}},
    }
    said = summary({**done.result, "metrics": {"average_precision": changed}})
    assert said[0].startswith("margin reaches 95 % of the full-data average precision with 80 labels; random does not")
    assert "at least 1.2 times" in said[0]
    assert said[1] == "entropy does not reach 90 % of the full-data average precision within the budget."


def test_options_that_do_not_fit_are_named(texts: LabeledTexts, tmp_path: Path) -> None:
    for wrong, message in (
        ({"strategies": ("best",)}, "unknown query strategy 'best'; choose from auto"),
        ({"strategies": ("cluster_margin",)}, "'cluster_margin' needs vectors"),
        ({"cold_start": "typiclust"}, "'typiclust' needs vectors"),
        ({"cold_start": "margin"}, "--cold-start margin needs a model"),
        ({"budget": 30}, "a budget of 30 labels is too small"),
    ):
        with pytest.raises(UsageError, match=message):
            run(texts, tmp_path, **wrong)
    with pytest.raises(UsageError, match="unknown features 'bert'"):
        with_features(params(), "bert")


@pytest.mark.slow
def test_al_simulate_prints_one_object(tmp_path: Path) -> None:
    write_corpus(tmp_path / "mails.csv")
    command = [sys.executable, "-m", "al_pipeline.cli.app", "simulate", "mails.csv", "--features", "tfidf", "--json"]
    command += ["--seeds", "1", "--budget", "60", "--batch-size", "20", "--seed-size", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout)
    assert result["area"].keys() == {"random", "margin", "auto"} and done.stderr == ""
    assert (tmp_path / result["report"]).is_file()
