"""Names that people read in lists: cut where a reader would, never in the middle of a character, and told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from al_pipeline.integrations.label_studio.projects import is_our_title, project_title
from al_pipeline.sanitize import counted, one_line, shortened
from al_pipeline.servers.prefect_server import deployment_name, is_our_deployment
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

ID = "0123456789ab"


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]


@pytest.mark.parametrize(
    ("text", "most", "short"),
    [
        ("short", 5, "short"),
        ("Which of these is spam?", 15, "Which of these…"),
        ("Which of, these is spam?", 10, "Which of…"),
        ("Donaudampfschiffahrtsgesellschaft", 10, "Donaudamp…"),
        ("ee\u0301e\u0301e\u0301", 4, "ee\u0301…"),
        ("a👩‍👩‍👧b", 5, "a…"),
        ("ab👍🏽", 4, "ab👍🏽"),
        ("abc👍🏽x", 5, "abc…"),
        ("🇩🇪🇫🇷🇮🇹", 5, "🇩🇪🇫🇷…"),
        ("🇩🇪🇫🇷🇮🇹", 4, "🇩🇪…"),
        ("a❤️b", 3, "a…"),
        ("anything", 1, "…"),
    ],
)
def test_a_text_is_cut_between_words_or_whole_characters(text: str, most: int, short: str) -> None:
    assert shortened(text, most) == short


@given(st.text(), st.integers(1, 60))
def test_a_shortened_text_fits(text: str, most: int) -> None:
    assert len(shortened(text, most)) <= most


@pytest.mark.parametrize("name", ["", "spam", "x" * 255, "a\udcffb", "<script>", "日本" * 40, "  \x00\x1b "])
@pytest.mark.parametrize(
    "question", ["Is it spam?", "Which of these many classes fits best to this text? " * 9, "\x07"]
)
def test_a_title_fits_into_label_studio_and_keeps_its_end(name: str, question: str) -> None:
    title = project_title(name, question, ID)
    assert 3 <= len(title) <= 50 and title.endswith(" (012345)")
    assert title.encode("utf-8").decode().isprintable() and is_our_title(title, ID)
    assert is_our_title(f"al {ID}", ID)
    assert not is_our_title("spam (012345) of mine", ID) and not is_our_title(None, ID)


def test_a_title_says_name_and_question() -> None:
    assert project_title("mails", "Is this mail spam?", ID) == "mails: Is this mail spam? (012345)"
    long = project_title("a-very-long-name-for-a-workspace", "Which of the six kinds of questions is it?", ID)
    assert long == "a-very-long-name-for-a…: Which of the… (012345)"


def test_control_characters_and_bidi_overrides_become_blanks_and_emoji_stay_joined() -> None:
    assert one_line("a\x1b[2J\u202eb\n\n c 👩‍👩‍👧") == "a [2J b c 👩‍👩‍👧"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("spam", "spam-0123456789ab"),
        ("spam ö 1", "spam-ö-1-0123456789ab"),
        ("<b>&%x", "b-x-0123456789ab"),
        ("🐟", "workspace-0123456789ab"),
        ("a\udcffb", "a-b-0123456789ab"),
        ("x" * 200, f"{'x' * 40}-0123456789ab"),
    ],
)
def test_a_deployment_has_a_name_that_prefect_takes(folder: str, name: str) -> None:
    found = deployment_name(Workspace(Layout(Path("/srv") / folder), ID))
    assert found == name and is_our_deployment(found, ID) and is_our_deployment(ID, ID)
    assert not set(found) & set("/%&><")
