"""A figure without its command, commit and machine is a rumour."""

import json
import platform
import subprocess
from pathlib import Path

import pytest

from benchmarks.record import command, commit, record


def test_a_record_says_what_was_run_where(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/elsewhere/lib/bench.py", "--seeds", "10"])
    path = record("train_speed", {"seconds": 1.5}, results=tmp_path)

    paper = json.loads(path.read_text())
    assert path == tmp_path / "train_speed.json"
    assert paper["figures"] == {"seconds": 1.5}
    assert paper["command"] == "python bench.py --seeds 10"
    assert paper["machine"]["cores"] >= 1
    assert paper["machine"]["memory_gib"] > 0
    assert paper["machine"]["python"] == platform.python_version()
    assert set(paper) == {"command", "commit", "date", "figures", "machine"}


def test_a_record_tells_no_path_and_no_host_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(Path.home() / "bench.py"), f"--out={tmp_path}/x.json"])
    text = record("quiet", {"seconds": 1}, results=tmp_path).read_text()
    assert str(tmp_path) not in text
    assert f"{Path.home()}/" not in text
    assert f'"{platform.node()}"' not in text


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/r/benchmarks/a.py", "--n", "3"], "python benchmarks/a.py --n 3"),
        (["/r/benchmarks/a.py", "--out=/r/benchmarks/results"], "python benchmarks/a.py --out=benchmarks/results"),
        (["/usr/local/bin/al", "round"], "al round"),
        (["benchmarks/a.py", "ratio=1/2", "http://127.0.0.1/x"], "python benchmarks/a.py ratio=1/2 http://127.0.0.1/x"),
    ],
)
def test_the_command_is_as_typed_in_the_repository(argv, shown):
    assert command(argv, Path("/r")) == shown


@pytest.mark.parametrize("name", ["../x", "", "A", "a b", "a.json"])
def test_a_name_that_is_no_plain_file_name_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name takes"):
        record(name, {}, results=tmp_path)


@pytest.mark.parametrize("figures", [{"x": float("nan")}, {"x": [float("inf")]}, {"log": f"{Path.home()}/x"}])
def test_figures_that_cannot_stand_are_refused(figures, tmp_path):
    with pytest.raises(ValueError, match=r"JSON|path of this machine"):
        record("x", figures, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_commit_knows_a_dirty_tree_but_not_results(tmp_path):
    def git(*words):
        subprocess.run(
            ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words), cwd=tmp_path, check=True, timeout=30
        )

    assert commit(tmp_path)["id"] is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    clean = commit(tmp_path)
    assert len(clean["id"]) == 40
    assert clean["dirty"] is False

    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/x.json").write_text("{}")
    assert commit(tmp_path)["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == {"id": clean["id"], "dirty": True}
