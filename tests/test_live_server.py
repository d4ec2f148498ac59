"""Live rounds on a real Label Studio, by its label stream, with answers that go through the resident process."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from annotating import ServerRig, leave
from embedded import LabelStudioServer
from harness import change_params, copy_workspace

from al_pipeline.data.ledger import read_events
from al_pipeline.errors import LabelStudioRefused, UsageError
from al_pipeline.live.listener import SECRET_HEADER, listening
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.live import Live
from al_pipeline.operations.live_webhook import told
from al_pipeline.operations.steps.label_studio import FIXED_FIRST
from al_pipeline.rounds.manifests import LiveQuestion, parse_live
from al_pipeline.workspace.workspace import open_workspace


@pytest.mark.server
@pytest.mark.slow
def test_people_are_asked_by_the_newest_model(
    label_studio: LabelStudioServer,
    template: tuple[Path, Mapping[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    workspace, truth = copy_workspace(template, tmp_path), template[1]
    change_params(
        workspace,
        {"enabled: false": "enabled: true", "poll_seconds: 1": "poll_seconds: 0.3", "test_tasks: 40": "test_tasks: 2"},
    )
    layout = workspace.layout
    live = Live(open_workspace(layout.root), lambda: connect(workspace))
    thread = threading.Thread(target=live.run)
    with connect(workspace) as oracle, ServerRig(label_studio, oracle) as people:
        thread.start()  # not before the SDK is imported: CPython 3.11 fails if two threads parse syntax trees at once
        try:
            deadline, given = time.monotonic() + 300, []
            while live.round is None:
                time.sleep(0.1)
                assert time.monotonic() < deadline, live.health
            ref = stored_project(layout)
            assert ref is not None
            while live.round is None or live.round.number == 0 or len(given) < 18:
                key = people.served(ref)  # fails if the queue is empty, while a round is built too
                assert key not in given
                if live.round is not None and len(given) > 15:
                    places = {one.task.push_key: _place(one, n) for n, one in enumerate(live.round.asked)}
                    assert key == max(live.round.open_keys, key=places.__getitem__), "the newest question comes first"
                people.answer(ref, key, "admin@example.com", truth[key.rsplit(":", 1)[1]])
                given.append(key)
                left = len(live.round.open_keys - {key}) if live.round is not None else 0
                while (found := live.round) and (key in found.open_keys or len(found.open_keys) <= left):
                    time.sleep(0.02)
                    assert time.monotonic() < deadline, live.health
            with (
                listening(0, live.wake, live.is_alive) as listener,
                pytest.raises(LabelStudioRefused, match="BANNED_SUBNETS"),
                told(workspace, listener),
            ):
                pass
        finally:
            live.stop()
            thread.join(60)
            live.close()
            leave(label_studio, workspace)
    asked = parse_live(layout.live_plan(1).read_text("utf-8"), 1)
    assert {one.kind for one in asked} >= {"planned", "chosen"}
    assert len({one.model for one in asked if one.kind == "chosen"}) > 2
    heard = [event.push_key for event in read_events(layout.events, layout.inbox_events)]
    assert sorted(heard) == sorted(given)


def _place(question: LiveQuestion, number: int) -> int:
    return number + (FIXED_FIRST if question.kind == "planned" else 0)


def test_a_webhook_only_wakes_and_only_with_the_secret() -> None:
    woken: list[int] = []
    with listening(0, lambda: woken.append(1), lambda: not woken) as found, httpx.Client(trust_env=False) as http:
        assert http.get(f"{found.url}/health").status_code == 200
        for secret, status in ((found.secret, 204), (found.secret, 204), ("forged", 403), ("", 403)):
            reply = http.post(f"{found.url}/wake", headers={SECRET_HEADER: secret}, content=b"{}")
            assert reply.status_code == status
        assert http.post(f"{found.url}/wake", content=b"x" * 66_000).status_code == 413
        assert http.post(f"{found.url}/other", headers={SECRET_HEADER: found.secret}).status_code == 404
        assert http.get(f"{found.url}/health").status_code == 503
        port = int(found.url.rpartition(":")[2])
        with pytest.raises(UsageError, match=f"port {port}"), listening(port, lambda: None, lambda: True):
            pass
    assert len(woken) == 2 == found.woken and found.refused == 2
