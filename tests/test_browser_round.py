"""A person's answer, given in a browser, on its way into the labelled set."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from browser import Browser, answer_one_task, log_in, open_queue, submit
from embedded import LabelStudioServer
from harness import small_workspace

from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.integrations.git import Git
from al_pipeline.operations.connect import connect
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import open_workspace

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]

WHO, LABEL = "reader.round@example.com", "spam"


def test_what_a_person_clicks_is_in_the_next_labelled_set(
    chromium: Path, label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    one_is_enough = {"quorum: 0.9": "quorum: 0.05", "test_size: 500": "test_size: 0"}
    workspace, _ = small_workspace(tmp_path, 30, one_is_enough)
    person = label_studio.account(WHO)
    assert tick(workspace, lambda: connect(workspace)).round == 0
    asked = read_plan(Git(workspace.layout.root), 0)[0]
    address = str(status(workspace).label_studio_page)

    posted = answer_one_task(label_studio.url, WHO, person.password, address, LABEL, tmp_path / "browser")
    assert posted["status"] == 201

    report = tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
    assert (report.published, report.round, report.refused) == ((0,), 1, {})
    [event] = read_events(workspace.layout.events)
    assert (event.type, event.annotator, event.label, event.origin) == ("label", WHO, LABEL, "manual")
    assert event.item_id == asked.item_id, "the page shows the first task of the plan"
    assert (event.lead_time or 0) > 0, "the page says how long it took"
    [row] = read_labeled(workspace.layout.labeled)
    assert (row.item_id, row.label, row.answers, row.round) == (asked.item_id, LABEL, 1, 0)


def test_two_people_at_once_get_different_tasks(
    chromium: Path, label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At overlap 1, in fresh browsers, at the address that `al status` gives: nobody's work is done twice."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    workspace, _ = small_workspace(tmp_path, 30, {"test_size: 500": "test_size: 0"})
    assert tick(workspace, lambda: connect(workspace)).round == 0
    address = str(status(workspace).label_studio_page)
    assert "labeling" not in address
    people = {email: label_studio.account(email) for email in ("left.pair@example.com", "right.pair@example.com")}
    with Browser(tmp_path / "left") as left, Browser(tmp_path / "right") as right:
        browsers = (left, right)
        for browser, (email, person) in zip(browsers, people.items(), strict=True):
            log_in(browser, label_studio.url, email, person.password)
        for browser in browsers:
            open_queue(browser, address)  # both look at their first task before either answers
        given = [submit(browser, LABEL) for browser in (*browsers, *browsers)]
    assert [answer["status"] for answer in given] == [201] * 4
    assert len({answer["task"] for answer in given}) == 4

    report = tick(open_workspace(workspace.layout.root), lambda: connect(workspace))
    assert report.pulled == {"label": 4}
    assert status(open_workspace(workspace.layout.root)).settled == 4


def test_a_class_shows_its_description_when_the_pointer_is_on_it(
    chromium: Path, label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain text, whatever is in it; a class without one shows none."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    said = 'an <b>offer</b> & "more" that nobody asked for'
    described = {'    - "spam"\n': f"    - {{name: spam, description: '{said}'}}\n", "test_size: 500": "test_size: 0"}
    workspace, _ = small_workspace(tmp_path, 30, described)
    assert tick(workspace, lambda: connect(workspace)).round == 0
    who = "reader.hints@example.com"
    person = label_studio.account(who)
    shown = f"//*[contains(text(), '{said}')]"
    with Browser(tmp_path / "browser") as browser:
        log_in(browser, label_studio.url, who, person.password)
        assert said not in open_queue(browser, str(status(workspace).label_studio_page))
        browser.point_at('//label[.//input[@name="ham"]]')
        time.sleep(1)
        assert said not in browser.text
        browser.point_at('//label[.//input[@name="spam"]]')
        browser.find(shown, 10)
