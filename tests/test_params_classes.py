"""Classes changed in the text of a params.yaml: the list, descriptions and guides follow, all other lines stay."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from al_pipeline.annotation.class_changes import classes_after
from al_pipeline.errors import BadParams
from al_pipeline.params import Meaning, parse_params
from al_pipeline.records import ClassChange, composed
from al_pipeline.sanitize import plain_form
from al_pipeline.workspace.params_classes import with_change, with_classes_of

PLAIN = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
LIST = "    - ham\n    - spam\n"
DESCRIBED = PLAIN.replace(
    LIST,
    """    - ham   # ours
    # about the next one
    - name: spam   # theirs
      description: ads
      examples: [buy now]
    - name: news
      description: what happened
      examples: [today, buy now]
    # the end
""",
).replace("guide: {}", "guide:\n    spam: [win, free]\n    news: [today]\n   ")
B = ("ham", "spam")
BCD = ("ham", "spam", "news")


def changed(text: str, change: ClassChange) -> tuple[str, list[str]]:
    """The new text, and the lines that went and came."""
    new = with_change(text, change, classes_after(change))
    lines = difflib.unified_diff(text.splitlines(), new.splitlines(), n=0, lineterm="")
    return new, [line for line in lines if line[:2] not in ("--", "++", "@@")]


def test_the_template() -> None:
    _, lines = changed(PLAIN, ClassChange("rename", B, ("spam",), ('junk "mail": #1',)))
    assert lines == ["-  version: 1", "+  version: 2", "-    - spam", r'+    - "junk \"mail\": #1"']
    _, lines = changed(PLAIN, ClassChange("split", B, ("ham",), ("a", "b")))
    assert lines == ["-  version: 1", "+  version: 2", "-    - ham", '+    - "a"', '+    - "b"']
    _, lines = changed(PLAIN, ClassChange("add", B, (), ("c",)))
    assert lines == ["-  version: 1", "+  version: 2", '+    - "c"']


def test_descriptions_and_guides_go_with_their_class() -> None:
    new, lines = changed(DESCRIBED, ClassChange("rename", BCD, ("spam",), ("junk",)))
    params = parse_params(new)
    assert params.schema_.meanings["junk"] == Meaning(description="ads", examples=["buy now"])
    assert params.select.guide == {"junk": ["win", "free"], "news": ["today"]}
    assert '+    - name: "junk"   # theirs' in lines and "    # about the next one" in new.splitlines()
    new, _ = changed(DESCRIBED, ClassChange("merge", BCD, ("spam", "news"), ("other",)))
    params = parse_params(new)
    assert params.schema_.meanings == {
        "other": Meaning(description="ads; what happened", examples=["buy now", "today"])
    }
    assert params.select.guide == {"other": ["win", "free", "today"]}
    new, _ = changed(DESCRIBED, ClassChange("merge", BCD, ("spam", "news"), ("news",)))
    assert parse_params(new).schema_.meanings["news"].description == "what happened"
    new, _ = changed(DESCRIBED, ClassChange("retire", BCD, ("spam",)))
    params = parse_params(new)
    assert (list(params.schema_.meanings), list(params.select.guide)) == (["news"], ["news"])


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace("  labels:  ", "  labels: [ham, spam]  ").replace(LIST, ""),
        PLAIN.replace(LIST, "  - ham\n  - spam\n"),
        PLAIN.replace(LIST, "    -  ham\n    -\n      spam\n"),
        PLAIN.replace("\n", "\r\n"),
        "\ufeff" + PLAIN,
        PLAIN.replace(LIST, '    - "ham"\n    - {name: spam, description: "ads"}\n'),
    ],
)
def test_however_the_list_is_written(text: str) -> None:
    before = parse_params(text)
    assert before.schema_.labels == ["ham", "spam"]
    for change in (
        ClassChange("rename", B, ("ham",), ("x",)),
        ClassChange("split", B, ("spam",), ("x", "y")),
        ClassChange("add", B, (), ("x",)),
    ):
        new, lines = changed(text, change)
        params = parse_params(new)
        assert tuple(params.schema_.labels) == classes_after(change) and params.schema_.version == 2
        assert len(lines) <= 9, "only the lines of the schema change"
        assert new.count("\r\n") in (0, new.count("\n")) and new.startswith("\ufeff") == text.startswith("\ufeff")


def test_back_to_the_classes_of_another_file() -> None:
    renamed, _ = changed(DESCRIBED, ClassChange("merge", BCD, ("spam", "news"), ("other",)))
    by_hand, _ = changed(renamed, ClassChange("add", ("ham", "other"), (), ("own",)))
    back = parse_params(with_classes_of(by_hand, DESCRIBED, ("ham", "other")))
    assert back.schema_.labels == [*BCD, "own"] and back.schema_.version == 4
    assert back.schema_.meanings == parse_params(DESCRIBED).schema_.meanings
    assert back.select.guide == parse_params(DESCRIBED).select.guide
    exact = parse_params(with_classes_of(by_hand, DESCRIBED, ("ham", "other", "own")))
    assert exact.schema_.labels == [*BCD]


def test_what_no_params_can_hold_is_refused() -> None:
    with pytest.raises(BadParams, match="differ by more than case"):
        changed(PLAIN, ClassChange("add", B, (), ("SPAM",)))


NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).map(composed)


@given(NAMES)
def test_any_name_survives(name: str) -> None:
    if name != name.strip() or not plain_form(name) or plain_form(name) in B or len(name) > 100:
        return
    new, _ = changed(PLAIN, ClassChange("rename", B, ("spam",), (name,)))
    assert parse_params(new).schema_.labels == ["ham", name]
