"""What every test runs with: a home and a git identity other than the user's, and the real servers.

If a requirement is missing on this machine (Label Studio's environment, a browser), its tests are skipped with a
message; with CI=true a skip is a failure. Tests with the fixture `device` run on each device of this machine, and few
have a GPU: the first lines of a run say so.
"""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from box import Box, box_below
from embedded import REPOSITORY, LabelStudioServer, PrefectServer, seed_templates
from filelock import FileLock
from harness import ENVIRONMENT, NOT_THE_USERS, Played, go_on, play, small_workspace
from hypothesis import settings
from warm import choose_folder, end_servers, leave_memory, start_servers, use_memory

from al_pipeline.features.device import find_device
from al_pipeline.integrations import forks
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.records import CPU
from al_pipeline.workspace.workspace import Workspace

T = TypeVar("T")
_SCRATCH = pytest.StashKey[str]()
_FAILED = pytest.StashKey[bool]()

LONGEST = (
    *("test_up_runs", "test_up", "test_clusters", "test_damage", "test_s3", "test_private_folders", "test_reproduce"),
    *("test_team_servers", "test_invariance", "test_flows", "test_simulation", "test_round", "test_rollback"),
    *("test_chaos", "test_kept", "test_tick", "test_finetuned", "test_plugins", "test_kills", "test_servers"),
    *("test_secrets", "test_class_names", "test_hostile", "test_histories", "test_line_ends", "test_corrections"),
    *("test_identity", "test_diff_log", "test_init", "test_power_loss", "test_browser_round", "test_endless"),
    *("test_schema_change", "test_sharing", "test_first_model"),
)
"""Files that take minutes, longest first: workers that begin with them end at about the same time."""


GARBAGE = (2_000, 10, 50)
"""Python's thresholds of garbage collection while tests run."""


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module is imported: some libraries read it only then."""
    gc.disable()  # until all is collected: what is imported stays
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for name in NOT_THE_USERS:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(REPOSITORY / ".venv-label-studio"))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        use_memory()
    config.stash[_SCRATCH] = tempfile.mkdtemp(prefix="al-tests-")
    os.environ["AL_HOME"] = f"{config.stash[_SCRATCH]}/al"
    os.environ["DVC_SITE_CACHE_DIR"] = f"{config.stash[_SCRATCH]}/dvc"  # for a `dvc` that a test runs by hand
    os.environ["PREFECT_HOME"] = f"{config.stash[_SCRATCH]}/prefect"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the variable of the process that starts them
        choose_folder()
        if config.getoption("numprocesses", None) and "not slow" not in config.getoption("markexpr"):
            start_servers()
    # The same examples each time, so that a failure is of the change at hand; `--hypothesis-profile=explore` looks for
    # others.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
    settings.load_profile(config.getoption("--hypothesis-profile") or "same")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Search no module and no test for garbage: a collection of all took 0.3 s, a third of the tests' own time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ or session.config.option.collectonly:
        return
    if any(item.get_closest_marker(mark) for item in session.items for mark in ("slow", "server")):
        start_servers()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_FAILED] = exitstatus != pytest.ExitCode.OK


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        end_servers()
    shutil.rmtree(config.stash[_SCRATCH], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" not in os.environ and not config.stash.get(_FAILED, False):  # what failed can be looked at
        leave_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which `--dist loadfile --no-loadscope-reorder` gives files to workers."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_report_header() -> str:
    gpu = find_device("auto")
    return f"devices: {CPU}" + (
        "; !! NOT TESTED: what a GPU computes, there is none here" if gpu == CPU else f"; {gpu}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `device` runs on each one of this machine."""
    if "device" in metafunc.fixturenames:
        devices = dict.fromkeys((CPU, find_device("auto")))
        metafunc.parametrize("device", devices, indirect=True, ids=lambda device: device.partition(":")[0])


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
    """Skip the test with a message if a requirement is missing on this machine."""
    if not found:
        pytest.skip(f"!! NOT TESTED: {reason}")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What a test leaves does not make this process unlike the fork servers, which the following tests would miss."""
    before = forks.read_at_import(os.environ)
    yield
    for name in forks.read_at_import(os.environ).keys() - before.keys() - {"PYTHONUTF8"}:  # the servers have that
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def al_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own for credentials, servers and the DVC remote."""
    home = tmp_path / "al-home"
    monkeypatch.setenv("AL_HOME", str(home))
    return home


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on another file system than `tmp_path`, which may be in memory or on the disk."""
    here = tmp_path.stat().st_dev
    places = [place for place in (Path("/dev/shm"), Path("/var/tmp"), REPOSITORY) if place.is_dir()]
    found = next((place for place in places if place.stat().st_dev != here and os.access(place, os.W_OK)), None)
    require(found is not None, "no second file system to write to")
    folder = Path(tempfile.mkdtemp(prefix=".al-test-", dir=found))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device of this machine, as `find_device` describes it."""
    yield request.param
    if request.param != CPU:
        import torch

        torch.use_deterministic_algorithms(False)  # which `Encoder` leaves on


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC and the encoder start as processes, not as forks (`warm.py`): for tests that look at a tick's processes."""
    monkeypatch.delenv(forks.FOLDER)


@pytest.fixture(scope="session")
def label_studio_venv() -> Path:
    """The virtual environment with Label Studio in it."""
    venv = Path(os.environ["AL_LABEL_STUDIO_VENV"])
    require((venv / "bin/label-studio").exists(), f"no Label Studio in {venv}; `make setup` installs it")
    return venv


@pytest.fixture
def label_studio_template(label_studio_venv: Path, al_home: Path) -> None:
    """A migrated database, which saves tests that start a workspace's own Label Studio a minute."""
    seed_templates(al_home)


@pytest.fixture(scope="session")
def label_studio(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """One real Label Studio for all tests; each has its own projects. Do not break it."""
    server = LabelStudioServer(tmp_path_factory.mktemp("label-studio"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def other_label_studio(
    label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabelStudioServer]:
    """A second Label Studio for one module, which its tests may break."""
    server = LabelStudioServer(tmp_path_factory.mktemp("other-label-studio"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real Prefect server: `api_url`, and `env` for clients. An idle one takes two per cent of a processor."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def box(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A workspace with all its servers, for one module; its tests leave it running and at rest."""
    with box_below(tmp_path_factory.mktemp("box")) as made:
        yield made


@pytest.fixture
def at_home(box: Box, al_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called in this process sees the box's home and its fork servers too."""
    monkeypatch.setenv("AL_HOME", str(box.home))
    monkeypatch.delenv(forks.FOLDER)


@pytest.fixture
def forget_packages() -> Iterator[None]:
    """What is installed is looked up anew in this test, and after it."""
    from own_package import PLUG

    from al_pipeline.plugins.packages import package_of

    package_of.cache_clear()
    yield
    package_of.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == PLUG]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Chromium; its driver is beside it on the PATH."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    require(found is not None, "no chromium; on Debian: apt-get install chromium chromium-driver")
    require(shutil.which("chromedriver") is not None, "no chromedriver; on Debian: apt-get install chromium-driver")
    return Path(str(found))


def prepared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> tuple[Path, T]:
    """A folder that `make` fills, and its result, made once for all workers of a run. Copy it, do not change it."""
    base = factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prepared"
    base.mkdir(exist_ok=True)
    done = base / f"{name}.pickle"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            done.write_bytes(pickle.dumps(make(base / name)))
    return base / name, pickle.loads(done.read_bytes())  # noqa: S301 (this run wrote it)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A workspace with items but no round, and the true labels. Tests work on copies, which all have its id."""
    return prepared(tmp_path_factory, "template", lambda folder: small_workspace(folder)[1])


def _played(factory: pytest.TempPathFactory, before: Played, name: str, rounds: int) -> Played:
    def make(folder: Path) -> SimulatedOracle:
        workspace, oracle, truth = go_on(before, folder)
        play(workspace, oracle, truth, rounds)
        return oracle

    folder, oracle = prepared(factory, name, make)
    return folder / "copy", before[1], oracle


@pytest.fixture(scope="session")
def started(template: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Round 0 is open, without answers. Tests continue from copies (`go_on`)."""
    return _played(tmp_path_factory, (*template, SimulatedOracle()), "started", 0)


@pytest.fixture(scope="session")
def once(started: Played, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """One published round; round 1 is open."""
    return _played(tmp_path_factory, started, "once", 1)


@pytest.fixture(scope="session")
def twice(once: Played, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Two published rounds; round 2 is open."""
    return _played(tmp_path_factory, once, "twice", 1)


@pytest.fixture(scope="session")
def undisturbed(twice: Played, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two published rounds, without any fault. Tests read it and change nothing."""
    return go_on(twice, tmp_path_factory.mktemp("undisturbed"))[0]
