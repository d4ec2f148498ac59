"""`al schedule`: params.yaml edited by machine, to the letter; what is shown where no server is up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.cli import app as cli
from al_pipeline.errors import BadParams, Locked
from al_pipeline.integrations.git import Git
from al_pipeline.operations.init import init
from al_pipeline.operations.schedule import change_schedule, with_schedule
from al_pipeline.params import parse_params
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEMPLATE = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")


def test_one_value_changes_and_comments_keep_their_place() -> None:
    edited = with_schedule(TEMPLATE, {"cron": "*/30 8-18 * * 1-5", "timezone": "Europe/Berlin", "active": False})
    before, after = TEMPLATE.splitlines(), edited.splitlines()
    assert [line for line in after if line not in before] == [
        '  cron: "*/30 8-18 * * 1-5"   # minute, hour, day of month, month, day of week',
        "  timezone: Europe/Berlin     # such as Europe/Berlin",
        "  active: false",
    ]
    assert with_schedule(TEMPLATE, {"active": True}) == TEMPLATE
    assert with_schedule(edited, {"cron": "0 * * * *", "timezone": "UTC", "active": True}) == TEMPLATE


SECTIONS = [
    "schedule: {cron: '5 4 * * *', timezone: UTC, active: true}  # in one line\n",
    "schedule:\n    active:   true\n    timezone: 'UTC'   # zone\n    cron:\n      '5 4 * * *'\n",
    '"schedule":\n  cron: >-\n    5 4 * * *\n  timezone: UTC\n  active: true\n',
    'schedule: {\n  "cron": "5 4 * * *",\n  "timezone": "UTC", "active": true }\n',
]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_however_the_section_is_written(section: str, newline: str) -> None:
    rest = with_section("")
    text = (rest + section).replace("\n", newline)
    edited = with_schedule(text, {"cron": "*/5 * * * *", "active": False})
    assert edited.startswith(rest.replace("\n", newline))
    schedule = parse_params(edited).schedule
    assert (schedule.cron, schedule.timezone, schedule.active) == ("*/5 * * * *", "UTC", False)


def with_section(section: str) -> str:
    """The template with another section `schedule`, or none."""
    start, end = TEMPLATE.index("schedule:"), TEMPLATE.index("annotators:")
    return TEMPLATE[:start] + section + TEMPLATE[end:]


def test_a_file_older_than_schedules_gets_the_templates_section() -> None:
    edited = with_schedule(with_section(""), {"timezone": "Asia/Tokyo"})
    assert edited.startswith(with_section("").rstrip())
    assert edited.endswith("  timezone: Asia/Tokyo        # such as Europe/Berlin\n  active: true\n")
    windows = with_schedule(with_section("").replace("\n", "\r\n"), {"timezone": "Asia/Tokyo"})
    assert windows == edited.replace("\n", "\r\n"), "no file with line ends of two kinds"


@given(
    cron=st.sampled_from(["* * * * *", "0 0 1 jan sun", "*/7 1-5,7 * * 0-6/2"]),
    zone=st.sampled_from(["UTC", "Etc/GMT+5", "America/Port-au-Prince", "Europe/Berlin"]),
    active=st.booleans(),
    names=st.sets(st.sampled_from(["cron", "timezone", "active"])),
    text=st.sampled_from([TEMPLATE, with_section(""), *(with_section(section) for section in SECTIONS)]),
)
@settings(max_examples=40)
def test_it_reads_back_as_what_was_written_and_nothing_else_changes(
    cron: str, zone: str, active: bool, names: set[str], text: str
) -> None:
    given_ = {"cron": cron, "timezone": zone, "active": active}
    values = {name: value for name, value in given_.items() if name in names}
    edited = with_schedule(text, values)
    found = parse_params(edited)
    assert {name: getattr(found.schedule, name) for name in values} == values
    assert {k: v for k, v in yaml.safe_load(edited).items() if k != "schedule"} == {
        k: v for k, v in yaml.safe_load(text).items() if k != "schedule"
    }
    assert with_schedule(edited, values) == edited


@pytest.mark.parametrize("values", [{"cron": "61 * * * *"}, {"cron": '" # '}, {"timezone": "Nowhere/Else"}])
def test_a_wrong_value_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(BadParams, match=rf"schedule\.{next(iter(values))}: got"):
        with_schedule(TEMPLATE, values)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init(tmp_path_factory.mktemp("made") / "workspace", ["ham", "spam"]).layout.root


@pytest.fixture
def workspace(made: Path) -> Workspace:
    """As `al init` left it."""
    git = Git(made)
    first = git.run("rev-list", "--max-parents=0", "HEAD").stdout.strip()
    git.run("reset", "--quiet", "--hard", first)
    return open_workspace(made)


@pytest.mark.slow
def test_a_change_is_committed_alone_and_only_where_the_file_was_as_committed(workspace: Workspace) -> None:
    layout, git = workspace.layout, Git(workspace.layout.root)
    (layout.root / "theirs.txt").write_text("x", encoding="utf-8")
    git.run("add", "theirs.txt")
    assert change_schedule(workspace, cron="30 5 * * *")
    assert git.run("show", "--name-only", "--format=%s").stdout.split("\n\n") == [
        "Schedule ticks: 30 5 * * * UTC",
        "params.yaml\n",
    ]
    assert git.run("status", "--porcelain").stdout == "A  theirs.txt\n", "what else was staged stays so"
    head = git.head()
    assert not change_schedule(workspace, cron="30 5 * * *") and git.head() == head, "nothing to change"

    layout.params.write_text(layout.params.read_text().replace("batch_size: 40", "batch_size: 41"), encoding="utf-8")
    assert not change_schedule(workspace, active=False) and git.head() == head
    params = open_workspace(layout.root).params
    assert (params.select.batch_size, params.schedule.active, params.schedule.cron) == (41, False, "30 5 * * *")


@pytest.mark.slow
def test_it_waits_for_no_tick_and_breaks_into_none(workspace: Workspace) -> None:
    before = workspace.layout.params.read_bytes()
    with locked(workspace.layout.lock, "a tick"), pytest.raises(Locked, match="a tick, process"):
        change_schedule(workspace, cron="30 5 * * *")
    assert workspace.layout.params.read_bytes() == before


@pytest.mark.slow
def test_the_command_shows_changes_and_says_what_is_missing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def al(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert stop.value.code == code, said
        return said.out + said.err

    assert "0 * * * * UTC" in al("schedule") and "no tick is scheduled: al up" in al("schedule")
    said = al("schedule", "--cron", "0 6 * * mon", "--timezone", "Europe/Berlin", "--off")
    assert "was changed, and committed" in said and "0 6 * * mon Europe/Berlin, off" in said
    assert "already has this schedule" in al("schedule", "--off")
    shown = json.loads(al("schedule", "--json"))
    assert shown == {
        "cron": "0 6 * * mon",
        "timezone": "Europe/Berlin",
        "active": False,
        "prefect_url": None,
        "applied": False,
        "differences": [],
        "worker": False,
        "next_run": None,
        "elsewhere": False,
        "problem": None,
    }
    assert "hour: must be from 0 to 23, got 25" in al("schedule", "--cron", "0 25 * * *", code=2)
    assert "`al up` starts it" in al("schedule", "apply", code=3)
