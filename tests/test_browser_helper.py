"""A person's way through Label Studio's pages: log in, open the label stream, choose, submit."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from browser import answer_one_task
from embedded import LabelStudioServer

pytestmark = [pytest.mark.browser, pytest.mark.server, pytest.mark.slow]

CONFIG = """
<View><Text name="text" value="$text"/>
  <Choices name="label" toName="text" choice="single" showInLine="true" required="true">
    <Choice value="ham" hotkey="1"/><Choice value="spam" hotkey="2"/></Choices></View>
"""


def test_what_a_person_submits_is_what_the_server_holds(
    chromium: Path, label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    person = label_studio.account("browser@example.com")
    settings = {"title": "browser", "label_config": CONFIG, "sampling": "Sequential sampling"}
    tasks = [{"data": {"text": f"<b>prize</b> number {n}"}} for n in range(2)]
    with httpx.Client(
        base_url=label_studio.url, headers={"Authorization": f"Token {label_studio.token}"}, timeout=60, trust_env=False
    ) as api:
        project = api.post("/api/projects", json=settings).json()["id"]
        api.post(f"/api/projects/{project}/import", json=tasks).raise_for_status()

        page = f"{label_studio.url}/projects/{project}/data"
        posted = answer_one_task(
            label_studio.url, "browser@example.com", person.password, page, "spam", tmp_path / "browser"
        )

        assert posted["status"] == 201
        assert "<b>prize</b> number 0" in posted["text"], "the first task, its markup shown as text"
        answer = api.get(f"/api/tasks/{posted['task']}/annotations").json()
        people = {user["id"]: user["email"] for user in api.get("/api/users").json()}
    assert (
        [a["result"][0]["value"]["choices"] for a in answer]
        == [["spam"]]
        == [r["value"]["choices"] for r in posted["result"]]
    )
    assert [people[a["completed_by"]] for a in answer] == ["browser@example.com"]
