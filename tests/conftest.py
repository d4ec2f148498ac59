"""What every test stands on: a home and a git identity that are not the user's, and the real servers.

A part that is missing on this machine (Label Studio's environment, a browser) makes its tests skip and say so; with
CI=true a skip is a failure.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from embedded import REPOSITORY, LabelStudioServer, PrefectServer, seed_templates
from harness import ENVIRONMENT, NOT_THE_USERS, copy_workspace, play, small_workspace
from hypothesis import settings

from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.workspace.workspace import Workspace

_SCRATCH = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before a test module is imported: some libraries read it only then."""
    for name in NOT_THE_USERS:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(REPOSITORY / ".venv-label-studio"))
    config.stash[_SCRATCH] = tempfile.mkdtemp(prefix="al-tests-")
    os.environ["AL_HOME"] = f"{config.stash[_SCRATCH]}/al"
    os.environ["DVC_SITE_CACHE_DIR"] = f"{config.stash[_SCRATCH]}/dvc"  # of a `dvc` that a test runs by hand
    os.environ["PREFECT_HOME"] = f"{config.stash[_SCRATCH]}/prefect"
    # The same examples each time, so that a failure is of the change at hand; `--hypothesis-profile=explore` looks for
    # others.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
    settings.load_profile(config.getoption("--hypothesis-profile") or "same")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_SCRATCH], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_skip_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_skip_in_ci(report)
    return report


def _fail_skip_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("CI", "").lower() in ("1", "true"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"with CI set, a skip is a failure: {reason}"


def require(found: bool, reason: str) -> None:
    """Skip the test, loudly, where a part of the machine that it needs is missing."""
    if not found:
        pytest.skip(f"!! NOT TESTED: {reason}")


@pytest.fixture(autouse=True)
def al_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own for credentials, servers and the DVC remote."""
    home = tmp_path / "al-home"
    monkeypatch.setenv("AL_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def label_studio_venv() -> Path:
    """The virtual environment with Label Studio in it."""
    venv = Path(os.environ["AL_LABEL_STUDIO_VENV"])
    require((venv / "bin/label-studio").exists(), f"no Label Studio in {venv}; `make setup` installs it")
    return venv


@pytest.fixture
def label_studio_template(label_studio_venv: Path, al_home: Path) -> None:
    """For tests that start a workspace's own Label Studio: spares them the minute of migrations."""
    seed_templates(al_home)


@pytest.fixture(scope="session")
def label_studio(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """One real Label Studio for all tests, each with projects of its own. Do not break it."""
    server = LabelStudioServer(tmp_path_factory.mktemp("label-studio"))
    yield server
    server.stop()


@pytest.fixture
def fresh_label_studio(
    label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], LabelStudioServer]]:
    """Makes real Label Studios that a test may break."""
    made: list[LabelStudioServer] = []

    def make() -> LabelStudioServer:
        made.append(LabelStudioServer(tmp_path_factory.mktemp("fresh-label-studio")))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """One real Prefect server for all tests: `api_url`, and `env` for clients."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A browser, and the driver that steers it beside it on the PATH."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    require(found is not None, "no chromium; on Debian: apt-get install chromium chromium-driver")
    require(shutil.which("chromedriver") is not None, "no chromedriver; on Debian: apt-get install chromium-driver")
    return Path(str(found))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A workspace with items and no round, and the truth. Tests work on copies, which all have its id."""
    folder = tmp_path_factory.mktemp("template")
    _, truth = small_workspace(folder)
    return folder, truth


@pytest.fixture(scope="session")
def undisturbed(template: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two published rounds; nothing went wrong. Tests read it and change nothing."""
    workspace = copy_workspace(template, tmp_path_factory.mktemp("undisturbed"))
    play(workspace, SimulatedOracle(), template[1], 2)
    return workspace
