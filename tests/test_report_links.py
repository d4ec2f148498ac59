"""Items of a report lead to their tasks in Label Studio, and nowhere else; its times are those of the schedule."""

from __future__ import annotations

import html
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness import Played, go_on

from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.connect import task_pages
from al_pipeline.operations.report import _date, _zone, write_report
from al_pipeline.rounds.manifests import Params
from al_pipeline.sanitize import is_web_address
from al_pipeline.workspace.workspace import Workspace, open_workspace


@pytest.fixture(scope="module")
def played(twice: Played, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, SimulatedOracle, Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("links")
        patch.setenv("AL_HOME", str(folder / "home"))
        workspace, oracle, _ = go_on(twice, folder)
        return workspace, oracle, folder / "home"


@pytest.fixture(autouse=True)
def at_home(played: tuple[Workspace, SimulatedOracle, Path], al_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_HOME", str(played[2]))


def hrefs(workspace: Workspace) -> dict[str, str]:
    page = write_report(open_workspace(workspace.layout.root)).read_text("utf-8")
    found = re.findall(r'<a href="([^"]*)" rel="noreferrer" title="in Label Studio"><code>([^<]*)</code>', page)
    assert page.count("<a ") == len(found), "no other link"
    return {html.unescape(item): html.unescape(url) for url, item in found}


def test_each_item_leads_to_its_task(played: tuple[Workspace, SimulatedOracle, Path]) -> None:
    workspace, oracle, _ = played
    workspace.store_credentials("https://labels.example.org/studio/", "token")
    links = hrefs(workspace)
    assert links
    for item, url in links.items():
        assert url.startswith("https://labels.example.org/studio/projects/1/data?task=") and "labeling" not in url
        task = oracle.projects[1].tasks[int(url.rpartition("=")[2])]
        assert task.data["item_id"] == item
    path = write_report(workspace)
    before = path.read_bytes()
    assert write_report(workspace).read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "data:text/html,x",
        "ftp://labels.example.org",
        "//labels.example.org",
        "https://",
        "http:///x",
        "https://user:secret@labels.example.org",
        "https://user@labels.example.org",
        'https://a"onclick="x',
        "https://a b",
        "https://a\n",
        "https://a\u202eb",
        "",
    ],
)
def test_an_address_that_is_none_of_a_page_is_no_link(
    played: tuple[Workspace, SimulatedOracle, Path], url: str
) -> None:
    workspace, _, _ = played
    assert not is_web_address(url)
    workspace.store_credentials(url, "token")
    assert task_pages(workspace, 9) == {}
    assert hrefs(workspace) == {}


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://labels.example.org/x?y=1&z", "http://[::1]:80/"])
def test_an_address_of_a_page_is_one(url: str) -> None:
    assert is_web_address(url)


def test_another_project_or_clone_shows_none(played: tuple[Workspace, SimulatedOracle, Path], tmp_path: Path) -> None:
    workspace, _, _ = played
    workspace.store_credentials("http://127.0.0.1:1", "token")
    shutil.copytree(workspace.layout.root, tmp_path / "clone")
    shutil.rmtree(tmp_path / "clone/.al")
    assert task_pages(workspace, 1) and hrefs(open_workspace(tmp_path / "clone")) == {}
    state = workspace.layout.state(1)
    text = state.read_text("utf-8")
    try:
        for damage in ('{"tasks": 3}', '{"tasks": {"project_uid": "other", "numbers": {"a": 1}}}', "{}"):
            state.write_text(damage, "utf-8")
            assert "a" not in task_pages(workspace, 1)
    finally:
        state.write_text(text, "utf-8")


PARAMS = {
    "schema": {"question": "Is it spam?", "labels": ["ham", "spam"]},
    "round": {"overlap": 1},
    "evaluate": {"confidence": 0.95},
    "features": {},
    "annotators": [],
}


@pytest.mark.parametrize(
    ("schedule", "date"),
    [
        ({"timezone": "Europe/Berlin"}, "2026-07-01 14:00 CEST"),
        ({"timezone": "Asia/Kolkata"}, "2026-07-01 17:30 IST"),
        ({"timezone": "UTC"}, "2026-07-01 12:00 UTC"),
        ({"timezone": "localtime"}, "2026-07-01 12:00 UTC"),
        ({"timezone": "../../etc/passwd"}, "2026-07-01 12:00 UTC"),
        ({"timezone": 7}, "2026-07-01 12:00 UTC"),
        ({}, "2026-07-01 12:00 UTC"),
        ([], "2026-07-01 12:00 UTC"),
        (None, "2026-07-01 12:00 UTC"),
    ],
)
def test_times_are_those_of_the_schedule_with_their_zone(schedule: object, date: str) -> None:
    """A record comes out of git, written by anybody."""
    closed = datetime(2026, 7, 1, 12, tzinfo=UTC).timestamp()
    assert _date(closed, _zone(Params.from_row({**PARAMS, "schedule": schedule}))) == date
    assert _date(None, UTC) is None
    assert _date(1.0, _zone(Params.from_row(PARAMS))) == "1970-01-01 00:00 UTC"
