"""Deleting a person's data by the steps of SECURITY.md: the text is gone, rounds go on, only what it says is lost."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from hashlib import md5
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness import answer_all, play, small_workspace, tools_first

from al_pipeline.data.outputs import read_labeled
from al_pipeline.data.pool import count_items, fetch
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.predict import predict
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import open_workspace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def holding(text: str, *folders: Path) -> list[Path]:
    """The files that hold a text, packed in Parquet or not."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if data[:4] == b"PAR1":
            data += str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
        if text.encode() in data:
            found.append(path)
    return found


def test_the_steps_delete_a_text_and_the_rounds_go_on(tmp_path: Path) -> None:
    steps = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(.*?)```", steps, re.DOTALL)
    assert script is not None
    (tmp_path / "tombstone.py").write_text(re.sub(r"(?m)^   ", "", script[1]), encoding="utf-8")

    workspace, truth = small_workspace(tmp_path / "w")
    layout, oracle, remote = workspace.layout, SimulatedOracle(), tmp_path / "w/remote"
    play(workspace, oracle, truth, 1)
    item = read_labeled(layout.labeled)[0].item_id
    text, before = fetch([layout.pool], [item])[item].text, count_items([layout.pool])
    places = (layout.root, remote)
    assert len(holding(text, *places)) >= 3, "in the pool, in DVC's cache and in its remote"

    def run(*command: str, where: Path = layout.root, code: int = 0) -> str:
        done = subprocess.run(command, cwd=where, env=tools_first(), capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == (code != 0), done.stderr
        return done.stdout

    (old,) = run(sys.executable, str(tmp_path / "tombstone.py"), item).split()
    person, labels = "ann@example.org", {row.item_id: row.label for row in read_labeled(layout.labeled)}
    parts = [path for path in sorted(layout.events.glob("*.jsonl")) if person in path.read_text("utf-8")]
    older = [md5(path.read_bytes()).hexdigest() for path in parts]
    assert parts
    for path in parts:
        path.write_text(path.read_text("utf-8").replace(person, "person-1"), encoding="utf-8")
    publish = re.search(r"Publish[*]+: `([^`]+)`", steps)
    assert publish is not None
    run("sh", "-c", publish[1])
    for store in (remote, layout.root / ".dvc/cache"):
        for name in (old, *older):
            (store / "files/md5" / name[:2] / name[2:]).unlink()
    for folder in (layout.features, layout.terms, layout.private / "published"):
        assert folder.relative_to(layout.root).as_posix() in steps
        shutil.rmtree(folder, ignore_errors=True)
    assert holding(text, *places) == holding(person, *places) == []

    answer_all(oracle, truth, "bob@example.org")
    report = tick(open_workspace(layout.root), lambda: oracle)
    assert report.published == (1,), "the rounds go on"
    assert item in {row.item_id for row in read_labeled(layout.labeled)} and count_items([layout.pool]) == before
    assert fetch([layout.pool], [item])[item].text == "(deleted)"
    assert labels.items() <= {row.item_id: row.label for row in read_labeled(layout.labeled)}.items()
    again = tick(open_workspace(layout.root), lambda: oracle)
    assert again.published == () and holding(text, *places) == holding(person, *places) == []

    rows = list(predict(open_workspace(layout.root), iter([[("a", "win money")]]), 0))
    assert rows[0]["label"] in ("ham", "spam"), "an older model still serves"
    git = Git(layout.root)
    lost = [tag for tag in sorted(git.tags()) if git.show(tag, "data/pool.dvc") != git.show("HEAD", "data/pool.dvc")]
    assert lost == ["round-0000"], "the rounds from the one that brought it in up to the last before the deletion"
    clone = tmp_path / "clone"
    run("git", "clone", "--quiet", "--branch", "round-0000", str(layout.root), str(clone))
    run("dvc", "pull", "data/pool.dvc", where=clone, code=1)
    assert read_json(clone / "rounds/0000/round.json")["round"] == 0
