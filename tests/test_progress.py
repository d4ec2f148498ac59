"""The bar of a stage that runs in another process: what it writes, and that what cannot be read does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from al_pipeline import progress
from al_pipeline.files import read_json
from al_pipeline.progress import progress_reporter, shown


def test_a_stage_writes_when_there_is_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(progress, "write_json", lambda path, value: written.append(value["done"]))
    tell = progress_reporter(tmp_path / "progress.json", "training")
    for done in range(100_001):
        tell(done, 100_000)
    assert len(written) == 201
    assert written[0] == 0 and written[-1] == 100_000
    tell(0, 0)


def test_the_bar_says_what_is_done_of_how_much(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)
    path = tmp_path / "progress.json"
    with shown(path, show=True):
        path.write_text("torn", encoding="utf-8")
        progress_reporter(path, "fine-tuning")(30, 40)
    assert not path.exists()
    said = capfd.readouterr().err
    assert "fine-tuning" in said and "30/40" in said


def test_a_stage_that_tells_nothing_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with shown(tmp_path / "progress.json", show=True):
        pass
    assert capfd.readouterr().err.strip() == ""


def test_without_a_terminal_nothing_is_shown_and_an_old_state_is_forgotten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "progress.json"
    path.write_text("{}", encoding="utf-8")
    with shown(path, show=False):
        assert not path.exists()
        progress_reporter(path, "fine-tuning")(1, 2)
    assert read_json(path) == {"what": "fine-tuning", "done": 1, "total": 2}
    assert capfd.readouterr().err == ""
