"""Where a user's Prefect is: as Prefect itself says, from files that its own command line wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import small_workspace

from al_pipeline.integrations.prefect_settings import active_profile, client_settings
from al_pipeline.operations.checks.services import check_schedule
from al_pipeline.operations.schedule import read_schedule
from al_pipeline.operations.status import status
from al_pipeline.servers import prefect_elsewhere
from al_pipeline.servers.process import free_port

TEAM = "https://prefect.example.org/api"
TOOL = Path(sys.executable).with_name("prefect")


def prefect(*words: str, **variables: str) -> str:
    done = subprocess.run(
        [str(TOOL), *words], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def as_prefect_sees_it(**variables: str) -> str | None:
    code = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value() or '')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip() or None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's `PREFECT_HOME` without profiles."""
    folder = tmp_path / "prefect-home"
    folder.mkdir()
    monkeypatch.setenv("PREFECT_HOME", str(folder))
    for name in ("PREFECT_PROFILES_PATH", "PREFECT_PROFILE", "PREFECT_API_URL", "PREFECT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_prefects_own_command_set_is_read(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert client_settings() is None
    prefect("config", "set", f"PREFECT_API_URL={TEAM}/", "PREFECT_API_KEY=pnu_1")
    prefect("profile", "create", "other")
    prefect("-p", "other", "config", "set", "PREFECT_API_URL=http://127.0.0.1:4299/api", "PREFECT_API_AUTH_STRING=al:x")

    def seen(changes: Mapping[str, str]) -> str | None:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            found = client_settings()
        assert (found.url if found else None) == ((as_prefect_sees_it(**changes) or "").rstrip("/") or None)
        return found.url if found else None

    assert seen({}) == TEAM
    assert seen({"PREFECT_PROFILE": "other"}) == "http://127.0.0.1:4299/api"
    assert seen({"PREFECT_API_URL": "http://127.0.0.1:1/api"}) == "http://127.0.0.1:1/api"
    assert seen({"PREFECT_PROFILE": "nobody's"}) is None
    kept = home.rename(tmp_path / "moved") / "profiles.toml"
    assert seen({"PREFECT_PROFILES_PATH": str(kept)}) == TEAM
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(kept))
    api = prefect_elsewhere()
    assert api is not None and (api.key, api.login) == ("pnu_1", None)
    assert api.source == f"Prefect's profile {active_profile().name!r}"
    monkeypatch.setenv("PREFECT_PROFILE", "other")
    api = prefect_elsewhere()
    assert api is not None and (api.key, api.login, api.source) == (None, ("al", "x"), "Prefect's profile 'other'")
    monkeypatch.setenv("PREFECT_API_URL", TEAM)
    api = prefect_elsewhere()
    assert api is not None and api.source == "PREFECT_API_URL"


@pytest.mark.parametrize(
    "text",
    ["", "active", 'active = "a"', 'active = "a"\n[profiles]\na = 3', "active = 3\n[profiles.3]\n", "[" * 5000, "\0"],
)
def test_a_file_of_any_content_names_no_server(home: Path, text: str) -> None:
    (home / "profiles.toml").write_text(text)
    assert client_settings() is None and prefect_elsewhere() is None


@pytest.mark.slow
def test_status_schedule_and_doctor_ask_the_server_of_the_active_profile(home: Path, tmp_path: Path) -> None:
    workspace, _ = small_workspace(tmp_path, 20)
    url = f"http://127.0.0.1:{free_port()}/api"
    prefect("config", "set", f"PREFECT_API_URL={url}")
    found = read_schedule(workspace)
    assert (found.server, found.elsewhere) == (url, True) and "profile" in found.source
    assert found.problem, "nothing listens there"
    assert status(workspace, ask=False).prefect_url == url
    [finding] = check_schedule(workspace)
    assert finding.level == "warning" and "`prefect config set PREFECT_API_URL=URL` changes it" in finding.fix
