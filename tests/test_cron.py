"""Cron expressions: what is taken comes due, and Prefect takes it too."""

from __future__ import annotations

import re
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.cron import check_cron, check_timezone


@pytest.mark.parametrize(
    "text",
    [
        "0 * * * *",
        "*/15 8-18 * * 1-5",
        "0 3 1,15 * *",
        "5 4 * JAN-mar sun",
        "0 0 29 2 *",
        "0 0 31 2 1",
        "0-30/10 0 * * 7",
    ],
)
def test_what_a_schedule_takes(text: str) -> None:
    assert check_cron(text) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has five fields"),
        ("* * * *", "got 4"),
        ("0 * * * * *", "got 6"),
        ("0  * * * *", "single blanks"),
        (" 0 * * * *", "single blanks"),
        ("@hourly", "got 1"),
        ("60 * * * *", "minute: must be from 0 to 59, got 60"),
        ("0 24 * * *", "hour: must be from 0 to 23"),
        ("0 0 0 * *", "day of the month: must be from 1 to 31"),
        ("0 0 * 13 *", "month: must be from 1 to 12 or jan to dec, got 13"),
        ("0 0 * * 8", "day of the week: must be from 0 to 7 or sun to sat"),
        ("0 0 * * monday", "got monday"),
        ("30-10 * * * *", "minute: '30-10' ends before it begins"),
        ("5/15 * * * *", "*/15 steps through all"),
        ("*/0 * * * *", "a step must be from 1 to 59"),
        ("*/60 * * * *", "a step must be from 1 to 59"),
        ("1,,2 * * * *", "'' is not valid"),
        ("? * * * *", "'?' is not valid"),
        ("0 0 L * *", "got L"),
        ("0 0 * * 5#2", "'5#2' is not valid"),
        ("-1 * * * *", "'-1' is not valid"),
        ("0 0 30 2 *", "never comes due"),
        ("0 0 31 4,6,9,11 *", "never comes due"),
        ("\u0663 * * * *", "is not valid"),
        ("0\n* * * *", "got 5"),
    ],
)
def test_what_it_does_not_take_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_cron(text)
    assert says in str(caught.value)


def field(low: int, high: int, names: str = "") -> st.SearchStrategy[str]:
    one = st.one_of(st.integers(low, high).map(str), st.sampled_from(names.split() or [str(low)]))
    ranged = st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda two: "{}-{}".format(*sorted(two)))
    spread = st.one_of(st.just("*"), ranged)
    stepped = st.tuples(spread, st.integers(1, high)).map(lambda two: f"{two[0]}/{two[1]}")
    return st.lists(st.one_of(one, spread, stepped), min_size=1, max_size=3).map(",".join)


EXPRESSIONS = st.tuples(
    field(0, 59),
    field(0, 23),
    field(1, 31),
    field(1, 12, "jan FEB dec"),
    field(0, 7, "sun MON sat"),
).map(" ".join)


@pytest.mark.slow
@given(EXPRESSIONS)
@settings(max_examples=300, deadline=None)
def test_what_is_taken_here_is_taken_by_prefect_and_comes_due(text: str) -> None:
    """What is refused here may be taken there: then nothing is lost but a way to write it."""
    from datetime import UTC, datetime

    from prefect._vendor.croniter import croniter
    from prefect.client.schemas.schedules import CronSchedule

    try:
        check_cron(text)
    except ValueError as error:
        assert "never comes due" in str(error)
        return
    assert CronSchedule(cron=text, timezone="Europe/Berlin").cron == text
    assert croniter(text, datetime(2026, 1, 1, tzinfo=UTC)).get_next(datetime) > datetime(2026, 1, 1, tzinfo=UTC)


@given(st.text(max_size=30))
def test_any_text_is_taken_or_refused(text: str) -> None:
    try:
        assert len(check_cron(text).split(" ")) == 5
    except ValueError as error:
        assert str(error)


def _names_of_zones() -> list[str]:
    """Every name that a system or the tzdata package has for a zone, in other spellings too, and what is none."""
    known = available_timezones()
    names = set(known)
    for root in map(Path, TZPATH):
        names |= {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    names |= {spelling for name in known for spelling in (name.lower(), name.upper())}
    names |= {f"{tree}/{name}" for name in known for tree in ("posix", "right")}
    words = "localtime Factory posixrules CEST PDT IST BST GMT+1 UTC+2 +02:00 Europe/Berlin\n Europe//Berlin ./UTC"
    return sorted(names | set(words.split(" ")) | {"", " UTC", "Europe/Berlin ", "Europe"})


def test_a_time_zone_that_is_taken_is_taken_by_prefect_and_means_the_same_everywhere() -> None:
    from prefect.client.schemas.schedules import CronSchedule

    taken, refused = [], []
    for name in _names_of_zones():
        try:
            taken.append(check_timezone(name))
        except ValueError as error:
            refused.append(name)
            assert "such as UTC" in str(error) or "write " in str(error) or "look like UTC" in str(error)
    for name in taken:
        assert CronSchedule(cron="0 * * * *", timezone=name).timezone == name
        assert ZoneInfo(name).key == name
    assert {"UTC", "Europe/Berlin", "America/Argentina/Ushuaia", "Etc/GMT+5", "EST5EDT"} <= set(taken)
    # Of what Prefect takes, no more than what differs between machines is refused.
    assert available_timezones() & set(refused) <= {"localtime", "Factory", "posixrules"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("localtime", "means a different time zone on each machine"),
        ("Factory", "means a different time zone on each machine"),
        ("posixrules", "means a different time zone on each machine"),
        ("posix/Europe/Berlin", "write Europe/Berlin"),
        ("right/America/New_York", "write America/New_York"),
        ("europe/berlin", "write Europe/Berlin"),
        ("utc", "write UTC"),
        ("CEST", "unknown time zone"),
        ("GMT+1", "unknown time zone"),
    ],
)
def test_another_time_zone_is_refused_with_what_to_write(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check_timezone(name)
