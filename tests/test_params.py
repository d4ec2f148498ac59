"""`params.yaml`: whatever stands in it, it is taken whole or refused with its key, what it got and what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadInput, BadParams, UsageError
from al_pipeline.files import write_json
from al_pipeline.params import (
    MAX_CHARACTERS,
    Overrides,
    Params,
    check_overrides,
    load_overrides,
    load_params,
    parse_params,
)
from al_pipeline.validation import parse

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")


def leaves(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in values.items():
        found += leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return found


KEYS = leaves(yaml.safe_load(TEMPLATE))
LATER: dict[tuple[str, ...], Any] = {
    ("gate", "traffic"): False,
    ("traffic", "novel"): 0,
    ("stop", "predictions"): 0,
    ("stop", "error_price"): 0,
    ("round", "test_tasks"): 40,
    ("ingest", "encoding"): "",
    ("features", "device"): "cpu",
    ("select", "cold_start"): "random",
    ("select", "max_similarity"): 1.0,
    ("select", "names"): False,
    ("select", "cost"): "items",
    ("select", "guide"): {},
    ("select", "relabel"): 0.0,
    ("train", "names"): False,
    ("train", "weigh_by_confidence"): False,
    ("round", "max_overlap"): 3,
    ("labels", "consensus"): "majority",
    ("labels", "min_confidence"): 0,
    ("train", "finetune", "epochs"): 6,
    ("train", "finetune", "batch_size"): 16,
    ("train", "finetune", "learning_rate"): 0.0001,
    ("train", "finetune", "passes"): 10,
    ("quality", "review_size"): 20,
    ("quality", "review_sample"): 50,
    ("quality", "review_each_tick"): False,
    ("quality", "gold_share"): 0.0,
    ("quality", "min_gold"): 0.7,
    ("quality", "hold"): False,
    ("reviewers",): [],
}
SECTIONS = sorted({key[0] for key in KEYS if len(key) == 2})


def changed(key: tuple[str, ...], value: Any) -> str:
    """The template with another value at `key`."""
    values = yaml.safe_load(TEMPLATE)
    place = values
    for step in key[:-1]:
        place = place[step]
    place[key[-1]] = value
    return str(yaml.safe_dump(values, allow_unicode=True))


def refusal(text: str) -> str:
    with pytest.raises(BadParams) as caught:
        parse_params(text)
    return str(caught.value)


def test_the_template_is_valid_and_says_everything() -> None:
    params = parse_params(TEMPLATE)
    assert params.schema_.labels == ["ham", "spam"]
    values = msgspec.to_builtins(params)
    assert values["schema"].pop("meanings") == {}, "the file has them in `labels`"
    assert values == yaml.safe_load(TEMPLATE)


def test_what_a_record_keeps_is_taken_again() -> None:
    params = parse_params(TEMPLATE)
    assert parse(Params, msgspec.to_builtins(params), "a record") == params


def test_a_file_older_than_schedules_has_none() -> None:
    values = yaml.safe_load(TEMPLATE)
    del values["schedule"]
    assert not parse_params(yaml.safe_dump(values)).schedule.active


@pytest.mark.parametrize(
    ("size", "strategy", "says"),
    [
        (0, None, "size: got 0; expected: whole number, 1 to 100,000"),
        (100_001, None, "got 100001; expected: whole number, 1 to 100,000"),
        (None, "best", "strategy: got 'best'; expected: one of 'auto', 'margin', .*, 'kmeans'"),
    ],
)
def test_a_batch_takes_what_params_take(size: int | None, strategy: str | None, says: str) -> None:
    check_overrides(5, "entropy")
    check_overrides(None, None)
    with pytest.raises(UsageError, match=says):
        check_overrides(size, strategy)


def test_what_one_batch_was_asked_with_is_checked_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    write_json(path, {"round": 3, "size": 7})
    assert load_overrides(path) == Overrides(round=3, size=7)
    for wrong in ({"size": 7}, {"round": 3, "size": "7"}, {"round": 3, "colour": 1}):
        write_json(path, wrong)
        with pytest.raises(BadInput, match=r"overrides\.json"):
            load_overrides(path)


def test_the_parameters_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        parse_params(TEMPLATE).seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        (("seed",), -1, "whole number, at least 0, less than 4,294,967,296"),
        (("seed",), 2**32, "less than 4,294,967,296"),
        (("seed",), "7", "whole number"),
        (("seed",), 7.0, "whole number"),
        (("version",), 2, "expected: 1 alone"),
        (("schema", "labels"), ["ham"], "list of 2 to 200 names"),
        (("schema", "labels"), "ham,spam", "list of"),
        (("schema", "labels"), ["ham", "Ham"], "differ by more than case, blanks"),
        (("schema", "labels"), ["ham", "ham"], "differ by more than case, blanks"),
        (("schema", "labels"), ["ham", " spam"], "must not begin or end with blanks"),
        (("schema", "labels"), ["ham", ""], "1 to 100 characters"),
        (("schema", "labels"), ["ham", "a\n"], "without control characters"),
        (("schema", "labels"), {"ham", "spam"}, "list of 2 to 200 names"),
        (("select", "guide"), {"spam": {"free", "money"}}, "list of any number of texts"),
        (("seed",), True, "whole number"),
        (("schema", "labels"), ["ham", "a\nb"], "without control characters"),
        (("schema", "labels"), ["ham", 3], "expected: text"),
        (("schema", "labels"), ["ham", None], "expected: text"),
        (("schema", "question"), "", "1 to 500 characters"),
        (("schema", "fields"), [], "list of 1 to 20 names"),
        (("features", "kind"), "bert", "one of 'encoder', 'tfidf', 'encoder+tfidf'"),
        (("features", "max_tokens"), 4, "8 to 8,192"),
        (("train", "calibrate"), "true", "true or false"),
        (("train", "calibrate"), 1, "true or false"),
        (("train", "model"), "svm", "one of 'head', 'centroid', 'finetuned'"),
        (("train", "finetune", "epochs"), 0, "1 to 100"),
        (
            ("train", "finetune", "learning_rate"),
            "5e-5",
            "number, more than 0, at most 0.01 (YAML reads 5e-5 as text: write 5.0e-5",
        ),
        (("train", "finetune", "passes"), 1, "2 to 100"),
        (("select", "strategy"), "best", "'auto', 'margin', 'entropy', 'least_confidence'"),
        (("select", "batch_size"), 0, "1 to 100,000"),
        (("select", "random_share"), 1.5, "number, 0 to 1"),
        (("select", "random_share"), math.nan, "finite number"),
        (("evaluate", "confidence"), 1, "less than 1"),
        (("round", "deadline_days"), math.inf, "finite number"),
        (("round", "quorum"), 0, "more than 0"),
        (("round", "quorum"), "90%", "expected: number"),
        (("label_studio", "timeout_seconds"), -math.inf, "finite number"),
        (("schedule", "cron"), "61 * * * *", "minute: must be from 0 to 59, got 61"),
        (("schedule", "cron"), "@daily", "five fields"),
        (("schedule", "cron"), 5, "expected: text"),
        (("schedule", "timezone"), "Europe/Atlantis", "like UTC or Europe/Berlin"),
        (("schedule", "timezone"), "../../etc/passwd", "unknown time zone"),
        (("schedule", "timezone"), "Europe", "unknown time zone"),
        (("schedule", "timezone"), "", "unknown time zone"),
        (("schedule", "active"), "yes please", "true or false"),
        (("annotators",), "ann@example.org", "list of"),
        (("annotators",), None, "list of"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_takes(key: tuple[str, ...], value: Any, takes: str) -> None:
    message = refusal(changed(key, value))
    assert message.startswith(f"params.yaml: {'.'.join(key)}")
    assert "got " in message
    assert takes in message


def test_every_wrong_key_is_named_at_once() -> None:
    message = refusal(changed(("seed",), -1).replace("quorum: 0.9", "quorum: 9"))
    assert "seed" in message and "round.quorum" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true"])
def test_a_label_that_yaml_reads_as_true_or_false_says_to_quote_it(word: str) -> None:
    message = refusal(TEMPLATE.replace("    - ham\n", f"    - {word}\n"))
    assert "schema.labels.0" in message and 'put it in "quotes"' in message
    assert parse_params(TEMPLATE.replace("    - ham\n", f'    - "{word}"\n')).schema_.labels == [word, "spam"]


def test_keys_that_came_later_may_be_missing_and_mean_what_was_done_before() -> None:
    values = yaml.safe_load(TEMPLATE)
    for key, value in LATER.items():
        place = values
        for step in key[:-1]:
            place = place[step]
        del place[key[-1]]
        assert parse_params(changed(key, value)) == parse_params(yaml.safe_dump(values))
    assert parse_params(yaml.safe_dump(values)) == parse_params(TEMPLATE)


def test_a_strategy_on_vectors_is_refused_where_no_encoder_gives_them() -> None:
    text = changed(("select", "cold_start"), "typiclust").replace("kind: encoder+tfidf", "kind: tfidf")
    assert refusal(text) == "params.yaml: select.cold_start 'typiclust' needs features.kind encoder or encoder+tfidf"


def test_a_fine_tuned_model_is_refused_where_there_is_no_encoder_to_train() -> None:
    text = changed(("train", "model"), "finetuned")
    assert parse_params(text).train.finetune.passes == 10
    assert refusal(text.replace("kind: encoder+tfidf", "kind: tfidf")) == (
        "params.yaml: train.model 'finetuned' trains the encoder: it needs features.kind encoder or encoder+tfidf"
    )


def test_parameters_older_than_fine_tuning_are_taken() -> None:
    values = yaml.safe_load(TEMPLATE)
    del values["train"]["finetune"]
    assert parse_params(yaml.safe_dump(values)) == parse_params(TEMPLATE)


def test_a_guide_names_classes_of_the_schema_and_gives_something() -> None:
    assert parse_params(changed(("select", "guide"), {"spam": [" free money "]})).select.guide == {
        "spam": ["free money"]
    }
    assert "select.guide names 'eggs', which is not a class" in refusal(changed(("select", "guide"), {"eggs": ["x"]}))
    assert "select.guide.spam is empty" in refusal(changed(("select", "guide"), {"spam": []}))


@pytest.mark.parametrize("key", [key for key in KEYS if key not in LATER], ids=".".join)
def test_a_missing_key_is_named(key: tuple[str, ...]) -> None:
    values = yaml.safe_load(TEMPLATE)
    place = values
    for step in key[:-1]:
        place = place[step]
    del place[key[-1]]
    assert refusal(yaml.safe_dump(values)) == f"params.yaml: {'.'.join(key)}: is missing"


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_an_unknown_key_is_named(section: str) -> None:
    key = (section, "colour") if section else ("colour",)
    assert refusal(changed(key, "green")) == f"params.yaml: {'.'.join(key)}: no such key; remove it or fix its spelling"


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_key_that_stands_there_twice_is_refused(key: tuple[str, ...]) -> None:
    indent = "  " * (len(key) - 1)
    lines = TEMPLATE.splitlines(keepends=True)
    start = 0 if len(key) == 1 else lines.index(next(line for line in lines if line.startswith(f"{key[0]}:")))
    place = next(n for n in range(start, len(lines)) if lines[n].startswith(f"{indent}{key[-1]}:"))
    message = refusal("".join([*lines[:place], f"{indent}{key[-1]}: 0\n", *lines[place:]]))
    assert f"the key '{key[-1]}' occurs twice" in message and "line" in message


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    assert "aliases are not supported" in refusal(bomb)
    assert "aliases are not supported" in refusal("a: &a [*a]\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just words",
        "null",
        "a: [",
        "a: b: c",
        "\tversion: 1",
        "version: 1\n--- \nversion: 1",
        "? [a, b]\n: 1",
        "!!python/object/apply:os.system ['true']",
        "a: !!binary $",
        "a: 2026-13-45",
        "a: \x00",
        "[" * 900_000,
        "[" * 30_000 + "]" * 30_000,
        "{a: " * 3000 + "1" + "}" * 3000,
        "1: 2\nnull: 3\ntrue: 4\n",
    ],
)
def test_what_is_no_params_file_is_refused(text: str) -> None:
    assert refusal(text).startswith("params.yaml")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 20_000, "1" + ":59" * 3000])
@pytest.mark.parametrize("key", ["seed", "batch_size"])
def test_numbers_of_thousands_of_digits_are_refused(key: str, number: str) -> None:
    before = {"seed": "seed: 20260101", "batch_size": "batch_size: 40"}[key]
    message = refusal(TEMPLATE.replace(before, f"{key}: {number}"))
    assert len(message) < 500


def test_a_file_too_long_to_be_one_is_refused_unread() -> None:
    assert "at most 1,000,000" in refusal(TEMPLATE + "#" * MAX_CHARACTERS)


def test_a_long_value_is_not_repeated_in_full() -> None:
    assert len(refusal(changed(("seed",), "x" * 10_000))) < 300


def test_a_missing_file_and_one_that_is_not_utf8_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadParams, match="is missing; `git checkout"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(TEMPLATE.encode("utf-16"))
    with pytest.raises(BadParams, match="not UTF-8"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbf" + TEMPLATE.encode())
    assert load_params(tmp_path / "params.yaml").seed == 20260101


def taken_or_refused(text: str) -> None:
    try:
        parse_params(text)
    except BadParams as error:
        assert str(error).startswith("params.yaml")


@given(st.text(max_size=300))
@settings(max_examples=150)
def test_any_text_is_taken_or_refused(text: str) -> None:
    taken_or_refused(text)


@given(st.data())
@settings(max_examples=100)
def test_a_damaged_template_is_taken_or_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEMPLATE)))
    end = data.draw(st.integers(start, min(len(TEMPLATE), start + 40)))
    taken_or_refused(TEMPLATE[:start] + data.draw(st.text(max_size=20)) + TEMPLATE[end:])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)


SEAMS: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("ingest", "max_characters"): lambda value: type(value) is int and value >= 1,
    ("round", "deadline_days"): lambda value: type(value) in (int, float) and 0 < value < math.inf and is_float(value),
    ("train", "calibrate"): lambda value: type(value) is bool,
    ("features", "precision"): lambda value: type(value) is str and value in ("auto", "float32", "bfloat16"),
    ("ingest", "text_column"): lambda value: is_name(value),
    ("ingest", "sources"): lambda value: type(value) is list and all(map(is_text, value)),
}


def is_float(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_text(value: Any) -> bool:
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


def is_name(value: Any) -> bool:
    return is_text(value) and 1 <= len(value) <= 100 and not set(map(chr, (*range(32), 127))) & {*value}


@pytest.mark.parametrize("key", SEAMS, ids=".".join)
@given(
    value=VALUES
    | st.sampled_from([True, 1, 1.0, 10**400, math.inf, -math.inf, math.nan, "auto", "auto\n", "a\n", "\x7f", "\ud800"])
    | st.sets(st.text(max_size=3), max_size=2)
    | st.tuples(st.text(max_size=3))
    | st.lists(st.text(max_size=3), max_size=3)
)
def test_a_value_is_taken_only_if_it_has_the_type_of_its_key(key: tuple[str, str], value: Any) -> None:
    values = yaml.safe_load(TEMPLATE)
    values[key[0]][key[1]] = value
    try:
        section = getattr(parse(Params, values, "params.yaml"), key[0])
    except ValueError as error:
        assert not SEAMS[key](value) and str(error).startswith(f"params.yaml: {key[0]}.{key[1]}")
    else:
        assert SEAMS[key](value) and getattr(section, key[1]) == value


@given(st.sampled_from([*KEYS, *((section,) for section in SECTIONS)]), VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_at_any_key_is_taken_or_refused_by_its_name(key: tuple[str, ...], value: Any) -> None:
    try:
        text = changed(key, value)
    except (UnicodeError, yaml.YAMLError):
        return
    try:
        parse_params(text)
    except BadParams as error:
        assert key[0] in str(error) or "not valid YAML" in str(error)
