"""What a template has gained comes into a user's file; what is the user's stays, to the comment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadParams
from al_pipeline.operations.schedule import with_schedule
from al_pipeline.params import parse_params
from al_pipeline.workspace.params_file import with_missing

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
WHOLE: dict[str, Any] = yaml.safe_load(TEMPLATE)
LEAVES = [(key,) for key in WHOLE if key != "schema"] + [
    (key, inner) for key, value in WHOLE.items() if isinstance(value, dict) and key != "schema" for inner in value
]


def without(text: str, path: tuple[str, ...]) -> str:
    """The template's text without a key (and without its section, where that would be left empty)."""
    lines = text.split("\n")
    depth = len(path) - 1
    begin = next((n for n, line in enumerate(lines) if line.startswith(f"{path[0]}:")), None)
    if begin is None:
        return text
    if depth:
        inner = next((n for n in range(begin + 1, len(lines)) if lines[n].startswith(f"  {path[1]}:")), None)
        if inner is None or len(yaml.safe_load(text)[path[0]]) == 1:
            return text
        begin = inner
    end = begin + 1
    while end < len(lines) and lines[end].startswith("  " * (depth + 1)):
        end += 1
    return "\n".join([*lines[:begin], *lines[end:]])


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_any_one_key_comes_back_with_its_comment_where_it_stood(path: tuple[str, ...]) -> None:
    old = without(TEMPLATE, path)
    assert yaml.safe_load(old) != WHOLE or len(path) == 2
    text, added = with_missing(old, TEMPLATE)
    assert yaml.safe_load(text) == WHOLE
    assert [line for line in text.split("\n") if line] == [line for line in TEMPLATE.split("\n") if line]
    if old != TEMPLATE:
        assert added == (".".join(path),)


@given(st.sets(st.sampled_from(LEAVES)))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_keys_come_back_and_no_line_of_the_users_is_touched(paths: set[tuple[str, ...]]) -> None:
    old = TEMPLATE
    for path in sorted(paths):
        old = without(old, path)
    old = old.replace("batch_size: 40 ", "batch_size: 7  # mine").replace("quorum: 0.9 ", "quorum: 0.5")
    text, added = with_missing(old, TEMPLATE)
    assert yaml.safe_load(text).keys() == WHOLE.keys()
    kept = iter(text.split("\n"))
    assert all(line in kept for line in old.split("\n")), "the user's lines are all there, in their order"
    again, more = with_missing(text, TEMPLATE)
    assert (again, more) == (text, ())
    assert set(added) <= {".".join(path) for path in LEAVES}


def test_other_indentation_odd_comments_and_values_are_kept() -> None:
    mine = (
        "# my file\nversion: 1\n\nselect:\n      strategy: 'random'   # mine\n\n"
        "      # about the size\n      batch_size: 3\nannotators: []  # nobody yet\n"
    )
    template = (
        "version: 1\n\nselect:\n  strategy: margin\n  share: 0.1   # new\n"
        "                 # and what it means\n  batch_size: 40\n  last: [1,\n    2]\n\n"
        "# when\nschedule:\n  cron: ''   # never\n\nannotators: []\n"
    )
    text, added = with_missing(mine, template)
    assert added == ("select.share", "select.last", "schedule")
    assert text == (
        "# my file\nversion: 1\n\nselect:\n      strategy: 'random'   # mine\n"
        "      share: 0.1   # new\n                     # and what it means\n\n"
        "      # about the size\n      batch_size: 3\n      last: [1,\n        2]\n\n"
        "# when\nschedule:\n  cron: ''   # never\n\nannotators: []  # nobody yet\n"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("select: {strategy: margin}\n", "these keys by hand: version, select.share"),
        ("{select: {strategy: margin, share: 1}}\n", "these keys by hand: version"),
        ("- a\n", "not valid YAML, or has no keys"),
        ("a: [\n", "not valid YAML"),
        ("", "not valid YAML, or has no keys"),
    ],
)
def test_what_cannot_be_extended_says_which_keys_to_add(text: str, says: str) -> None:
    with pytest.raises(BadParams, match=says):
        with_missing(text, "version: 1\nselect:\n  strategy: margin\n  share: 0.1\n")


def with_section(section: str) -> str:
    """The template with another section `schedule`."""
    start = TEMPLATE.index("schedule:")
    return TEMPLATE[:start] + section + TEMPLATE[TEMPLATE.index("\n\n", start) + 1 :]


FORMS = {
    "the template": TEMPLATE,
    "CRLF": TEMPLATE.replace("\n", "\r\n"),
    "a byte order mark": "\ufeff" + TEMPLATE,
    "lists as deep as their key": TEMPLATE.replace("    - ", "  - "),
    "four blanks": "\n".join(" " * (len(line) - len(line.lstrip())) + line for line in TEMPLATE.split("\n")),
    "sections of different depth": re.sub(r"(?m)^  (cron|timezone|active):", r"    \1:", TEMPLATE),
    "values in columns": TEMPLATE.replace("batch_size: 40", "batch_size:   40").replace("quorum: 0", "quorum:  0"),
    "a list in lines": TEMPLATE.replace("fields: [text] ", "fields: [text,\n    text2]"),
    "blanks in brackets": TEMPLATE.replace("[text] ", "[ text ]"),
    "other numbers": TEMPLATE.replace("rate: 0.0001", "rate: 1.0e-4").replace("200000", "200_000"),
    "a text in lines": TEMPLATE.replace("question: Which label fits", "question: Which label\n    fits"),
    "a block": TEMPLATE.replace("question: Which label fits this text?", "question: |-\n    Which label\n    fits"),
    "single quotes": TEMPLATE.replace("UTC  ", "'UTC'").replace('""', "''"),
    "no last line end": TEMPLATE.rstrip("\n"),
    "blanks at the end of a line": TEMPLATE.replace("version: 1\n", "version: 1  \n"),
    "a document's start": "---\n" + TEMPLATE,
    "a document's end": TEMPLATE + "...\n",
    "anchors and tags": re.sub(r"(?m)^  (cron|timezone|bootstrap): ", r"  \1: &\1 ", TEMPLATE).replace(
        "\n  confidence: ", "\n  confidence: !!float "
    ),
    "words behind it all": TEMPLATE + "\n\n# the end\n",
    "a section in a line": with_section("schedule: {cron: '0 * * * *', timezone: UTC, active: true}  # mine\n"),
    "a section in braces": with_section('schedule: {\n  "cron": "0 * * * *",\n  "timezone": "UTC", "active": true }\n'),
    "quoted keys": with_section('"schedule":\n  "cron":   "0 * * * *"\n  timezone: UTC\n  active: true\n'),
}


@pytest.mark.parametrize("form", FORMS)
def test_however_a_file_is_written_no_byte_of_the_users_changes(form: str) -> None:
    text = FORMS[form]
    gained = ("warmth: 3      # new\n", "section:        # new too\n  of: [3]\n")
    template = TEMPLATE.replace("  batch_size: 40\n", f"  batch_size: 40\n  {gained[0]}")
    template = template.replace("annotators:", f"{gained[1]}\nannotators:")
    extended, added = with_missing(text, template)
    assert added == ("select.warmth", "section")
    kept = iter(extended.encode().split(b"\n"))
    assert all(line in kept for line in text.encode().split(b"\n")), "every line is there, in its order"
    assert len(extended.splitlines()) - len(text.splitlines()) in (4, 5), "and the new ones, set apart by a blank one"
    assert len({line.endswith("\r\n") for line in extended.splitlines(keepends=True)[:-1]}) == 1
    assert with_missing(extended, template) == (extended, ())

    edited = with_schedule(text, {"cron": "*/5 8-18 * * *"})
    assert parse_params(edited.removeprefix("\ufeff")).schedule.cron == "*/5 8-18 * * *"
    begin, behind = re.split(r"[\"']0 \* \* \* \*[\"'](?: +(?=#))?", text)
    assert edited.startswith(begin) and edited.endswith(behind)
    assert re.fullmatch(r'"\*/5 8-18 \* \* \*" *', edited[len(begin) : len(edited) - len(behind)])
