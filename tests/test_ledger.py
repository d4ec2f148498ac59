"""The ledger and the inbox: files that only grow, each event once, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline import files
from al_pipeline.data import ledger
from al_pipeline.data.ledger import (
    add_to_inbox,
    append_inbox,
    append_part,
    merge_small_files,
    read_events,
    read_refused,
    still_refused,
)
from al_pipeline.errors import BadInput
from al_pipeline.records import Event, LabelIntervention, Selection, author_digest, canonical


def event(name: str, **changes: Any) -> Event:
    base = Event(name, "label", "item", "hash", "pool", 1, "key#p.1", "ann@example.com", label="ham")
    return replace(base, **changes)


def refusal(name: str) -> dict[str, Any]:
    return {"refused_id": name, "reason": "unknown label", "result": "[]"}


def names(*folders: Path) -> list[str]:
    return [event.event_id for event in read_events(*folders)]


def test_parts_are_read_in_the_order_in_which_they_were_appended(tmp_path: Path) -> None:
    for name in "cabd":
        append_part(tmp_path, [event(name)])
    assert names(tmp_path) == list("cabd")
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "part-000001.jsonl"


def test_the_millionth_part_comes_after_the_one_before(tmp_path: Path) -> None:
    files.write_jsonl(tmp_path / "part-999999.jsonl", [event("a").to_row()])
    append_part(tmp_path, [event("b")])
    append_part(tmp_path, [event("c")])
    assert names(tmp_path) == list("abc")


def test_only_what_follows_the_files_read_before_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round adds one part to hundreds. What is read is what a process finds that reads all of them."""
    book, inbox = tmp_path / "ledger", tmp_path / "inbox"
    for name in "abc":
        append_part(book, [event(name)])
    assert names(book) == list("abc") and names(book, inbox) == list("abc")
    merged: list[str] = []
    parsed = ledger._events
    monkeypatch.setattr(ledger, "_events", lambda *file: merged.append(Path(file[0]).name) or parsed(*file))
    add_to_inbox(inbox, [event("d"), event("a", label="spam")])
    assert names(book, inbox) == list("abcd") and merged == ["pull-000001.jsonl"]
    append_inbox(inbox, book)
    assert names(book) == list("abcd") and names(book, inbox) == list("abcd")
    assert merged.count("part-000004.jsonl") == 1 and "part-000003.jsonl" not in merged
    assert [one.label for one in read_events(book)] == ["ham"] * 4
    (book / "part-000002.jsonl").unlink()  # as only a hand does
    assert names(book, inbox) == list("acd")
    files.write_jsonl(book / "part-000001.jsonl", [event("x").to_row()])
    assert names(book) == list("xcd")


@pytest.mark.parametrize("line", [b"", b'{"event_id":', b"null", b'{"event_id": "x"}{"event_id": "y"}'])
def test_a_bad_line_among_good_ones_is_named(tmp_path: Path, line: bytes) -> None:
    append_part(tmp_path, [event("a"), event("b")])
    (part,) = tmp_path.iterdir()
    first, second = part.read_bytes().splitlines()
    part.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(BadInput, match=r"part-000001\.jsonl:2: "):
        read_events(tmp_path)


def test_a_known_event_is_not_appended_again(tmp_path: Path) -> None:
    append_part(tmp_path, [event("a")])
    assert append_part(tmp_path, [event("a", observed_at="later")]) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_an_event_given_twice_is_written_once(tmp_path: Path) -> None:
    append_part(tmp_path, [event("a"), event("b"), event("a", label="spam")])
    assert [(e.event_id, e.label) for e in read_events(tmp_path)] == [("a", "ham"), ("b", "ham")]


def test_the_inbox_leaves_out_what_the_ledger_knows(tmp_path: Path) -> None:
    inbox, parts = tmp_path / "inbox", tmp_path / "events"
    append_part(parts, [event("a")], [refusal("r")])
    path = add_to_inbox(inbox, [event("a"), event("b")], [refusal("r"), refusal("s")], ledger=parts)
    assert path is not None and path.name == "pull-000001.jsonl"
    assert names(inbox) == ["b"]
    assert [row["refused_id"] for row in read_refused(inbox)] == ["s"]


def test_the_inbox_moves_into_the_ledger_as_one_part_and_can_be_moved_twice(tmp_path: Path) -> None:
    inbox, parts = tmp_path / "inbox", tmp_path / "events"
    append_part(parts, [event("a")])
    add_to_inbox(inbox, [event("b")], [refusal("r")], ledger=parts)
    add_to_inbox(inbox, [event("c")], [refusal("s")], ledger=parts)
    append_inbox(inbox, parts)
    consumed = append_inbox(inbox, parts)
    assert names(parts) == names(parts, inbox) == list("abc")
    assert {path.name for path in parts.iterdir()} == {"part-000001.jsonl", "part-000002.jsonl", "refused-000001.jsonl"}
    assert {path.name for path in consumed} == {path.name for path in inbox.iterdir()}


def test_nothing_new_makes_no_file(tmp_path: Path) -> None:
    assert add_to_inbox(tmp_path, []) is None
    assert append_inbox(tmp_path / "inbox", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_two_files_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path, rows: list[dict[str, Any]]) -> None:
        if path.name.startswith("pull"):
            raise OSError("disk full")
        files.write_jsonl(path, rows)

    monkeypatch.setattr(ledger, "write_jsonl", crash)
    with pytest.raises(OSError, match="disk full"):
        add_to_inbox(tmp_path, [event("a")], [refusal("r")])
    monkeypatch.undo()
    add_to_inbox(tmp_path, [event("a")], [refusal("r")])
    assert names(tmp_path) == ["a"]
    assert len(read_refused(tmp_path)) == 1 == len(list(tmp_path.glob("refused-*.jsonl")))


def test_leftovers_of_a_killed_writer_and_other_files_are_not_read(tmp_path: Path) -> None:
    append_part(tmp_path, [event("a")])
    (tmp_path / f"{files.TEMPORARY_PREFIX}x.jsonl").write_text("{torn")
    (tmp_path / "notes.jsonl").write_text("mine")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"event_id": "b", "ty', "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"{}", "event_id: is missing"),
        (json.dumps({**event("b").to_row(), "round": "1"}).encode(), "round: got '1'; expected: whole number"),
        (json.dumps({**event("b").to_row(), "round": True}).encode(), "round: got True; expected: whole number"),
        (
            json.dumps({**event("b").to_row(), "type": "labels"}).encode(),
            "type: got 'labels'; expected: one of 'label', 'skip'",
        ),
        (
            json.dumps({**event("b").to_row(), "part": "train"}).encode(),
            "part: got 'train'; expected: one of 'pool', 'test'",
        ),
        (json.dumps({**event("b").to_row(), "label": ["ham"]}).encode(), "label: got ['ham']; expected: text"),
        (json.dumps({**event("b").to_row(), "item_id": 7}).encode(), "item_id: got 7; expected: text"),
        (json.dumps({**event("b").to_row(), "targets": "a"}).encode(), "targets: got 'a'; expected: list of"),
        (
            json.dumps({**event("b").to_row(), "lead_time": "1"}).encode(),
            "lead_time: got '1'; expected: whole number",
        ),
        (
            json.dumps({**event("b").to_row(), "mood": "good"}).encode(),
            "mood: no such key (was it written by a newer engine?)",
        ),
        *(
            (json.dumps({**event("b").to_row(), "intervention": asked}).encode(), ": intervention")
            for asked in (
                7,
                [],
                {},
                {"kind": "dance"},
                {"kind": "rollback"},
                {"kind": "rollback", "to": "1"},
                {"kind": "rollback", "to": 1, "after": 2},
                {"kind": "undo", "to": 1},
                {"kind": "revoke"},
                {"kind": "revoke", "selection": {"mood": "good"}},
                {"kind": "revoke", "selection": {"since": "yesterday"}},
                {"kind": "revoke", "selection": {"label": ["ham"]}},
                {"kind": "revoke", "selection": {"item": "a"}, "targets": []},
            )
        ),
    ],
)
def test_a_line_that_we_did_not_write_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    path = append_part(tmp_path, [event("a")])
    assert path is not None
    with path.open("ab") as out:
        out.write(line + b"\n")
    with pytest.raises(BadInput) as caught:
        read_events(tmp_path)
    assert f"{path}:2: " in str(caught.value) and says in str(caught.value)


def test_whole_seconds_stay_whole_and_half_of_a_surrogate_pair_is_read(tmp_path: Path) -> None:
    rows = [{**event("a").to_row(), "reason": "\ud800", "lead_time": 3}, {**event("b").to_row(), "lead_time": 3.0}]
    (tmp_path / "part-000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert json.dumps([one.to_row() for one in read_events(tmp_path)]) == json.dumps(rows)


def test_a_torn_refusal_is_named(tmp_path: Path) -> None:
    (tmp_path / "refused-000001.jsonl").write_text('{"refused_id": 7, "reason": "x"}\n')
    with pytest.raises(BadInput, match=r"refused-000001\.jsonl:1"):
        read_refused(tmp_path)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
some_events = st.lists(
    st.builds(event, st.sampled_from("abcdef"), item_id=texts, label=st.none() | texts, targets=st.tuples(texts)),
    max_size=6,
)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(some_events, max_size=4))
def test_what_is_appended_comes_back_each_event_once_in_the_order_of_its_first_coming(
    tmp_path_factory: pytest.TempPathFactory, pulls: list[list[Event]]
) -> None:
    root = tmp_path_factory.mktemp("ledger")
    expected: dict[str, Event] = {}
    for number, pulled in enumerate(pulls):
        for one in pulled:
            expected.setdefault(one.event_id, one)
        add_to_inbox(root / "inbox", pulled, ledger=root / "events")
        if number % 2:
            for path in append_inbox(root / "inbox", root / "events"):
                path.unlink()
    assert read_events(root / "events", root / "inbox") == list(expected.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, derandomize=True)
@given(json_values)
def test_anything_that_json_can_hold_has_a_text_that_can_be_written(value: Any) -> None:
    text = canonical(value)
    assert text.isascii() and canonical(json.loads(text)) == text


@pytest.mark.parametrize(
    "asked",
    [
        LabelIntervention("rollback", to=3, after="abc"),
        LabelIntervention("rollback", to=0),
        LabelIntervention("undo", undoes=7),
        LabelIntervention("revoke", selection=Selection("ann", 0, "a", "2026-03-01")),
        LabelIntervention("restore", selection=Selection(item="a")),
        LabelIntervention("revoke", selection=Selection(annotator="ann", label="caf\u00e9")),
    ],
)
def test_an_intervention_comes_back_as_it_was_written(tmp_path: Path, asked: LabelIntervention) -> None:
    one = replace(event("a"), type="quarantine", intervention=asked)
    append_part(tmp_path, [one, event("b")])
    assert read_events(tmp_path) == [one, event("b")]
    assert "intervention" not in event("b").to_row(), "an earlier version reads a ledger without any"


def _refused_answer(name: str, minute: int, **changes: Any) -> dict[str, Any]:
    told = {"push_key": "key", "annotation_id": 7, "annotator": "ann@example.com", "created_at": _at(0)}
    return {**refusal(name), **told, "updated_at": _at(minute), **changes}


def _at(minute: int) -> str:
    return f"2026-01-01T10:{minute:02}:00.000000Z"


@pytest.mark.parametrize("suffix", ["", "-" + author_digest("ann@example.com", _at(0))], ids=["earlier name", "name"])
def test_an_answer_that_was_taken_later_is_not_refused_whatever_form_its_name_has(suffix: str) -> None:
    taken = event("e", annotation_key=f"key#p.7{suffix}", updated_at=_at(2))
    kept = [_refused_answer("before", 1), _refused_answer("same state, by an earlier id", 2)]
    assert still_refused(kept, [taken]) == []
    assert still_refused([*kept, _refused_answer("after", 3)], [taken]) == [_refused_answer("after", 3)]


def test_of_an_edited_answer_one_refusal_stands_and_another_with_its_number_is_its_own() -> None:
    bobs = _refused_answer("bob", 1, annotator="bob@example.com", created_at=_at(1))
    assert still_refused([_refused_answer("a", 1), bobs, _refused_answer("b", 2)], []) == [
        _refused_answer("b", 2),
        bobs,
    ]
    taken = event("e", annotation_key=f"key#p.7-{author_digest('ann@example.com', _at(0))}", updated_at=_at(4))
    assert still_refused([_refused_answer("a", 1), bobs], [taken]) == [bobs]


def test_many_small_files_of_an_inbox_become_one_whenever_it_is_killed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger, "SMALL", 4)
    for name in "abcdefgh":
        add_to_inbox(tmp_path, [event(name)])
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        if merge_small_files(tmp_path):
            assert len(list(tmp_path.iterdir())) == len(before) - 3
            assert not merge_small_files(tmp_path), "what was merged is not small"
            for left in sorted(before)[-3:]:  # killed before it had removed them
                (tmp_path / left).write_bytes(before[left])
                assert names(tmp_path) == list("abcdefgh"[: "abcdefgh".index(name) + 1])
                (tmp_path / left).unlink()
    assert names(tmp_path) == list("abcdefgh") and len(list(tmp_path.iterdir())) == 2
    add_to_inbox(tmp_path, [event("i")])
    assert names(tmp_path) == list("abcdefghi")
