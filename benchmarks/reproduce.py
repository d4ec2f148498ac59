"""What reproduction and rollback cost: `al reproduce` of each round of a small workspace on real e-mails, compared with
the round's own build; then `al rollback` to the first round and `--undo`, each with the tick that carries it out.

    python -m benchmarks.reproduce [--size 1000] [--rounds 3]      writes benchmarks/results/reproduce.json

The e-mails are those of examples/spam/corpus.py, the answers are correct and come from the simulated oracle, git and
DVC are real, the remote is a folder. The first reproduced round encodes all vectors, as each does alone; the others are
reproduced in the same call. Everything is encoded and trained again, so the seconds grow with the pool.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from al_pipeline.files import read_json, write_jsonl
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.intervene import Change, rollback, undo
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace
from benchmarks.record import ROOT, record
from examples.spam.corpus import prepare

SETTINGS = {"test_size": 150, "seed_size": 40, "batch_size": 40}
PERSON = "ann@example.org"


def main() -> None:
    """Play rounds, reproduce them, record the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1000, help="e-mails in the pool and the test set")
    parser.add_argument("--rounds", type=int, default=3, help="published rounds, the seed round included")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder:
        os.environ["AL_HOME"] = f"{folder}/home"
        workspace, oracle = _play(Path(folder), options.size, options.rounds)
        records = read_history(workspace.layout, Git(workspace.layout.root)).rounds
        together = list(reproduce(workspace, None, on_progress=_tell))
        alone = list(reproduce(workspace, [options.rounds - 1], on_progress=_tell))
        going_back = _go_back(workspace, oracle)
    if wrong := [one for one in (*together, *alone) if one.difference is not None or one.compared != "bytes"]:
        raise SystemExit(f"not reproduced, so there is nothing to measure: {wrong}")
    figures = {
        **going_back,
        "items": options.size,
        "settings": SETTINGS,
        "features": records[0].params.features["kind"],
        "outputs_compared": len(alone[0].outputs),
        "build_seconds": {str(row.round): round(sum(row.seconds.values()), 3) for row in records},
        "reproduce_all_seconds": {str(one.round): one.seconds for one in together},
        "reproduce_last_alone_seconds": alone[0].seconds,
    }
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("reproduce", figures).relative_to(ROOT))  # noqa: T201


def _play(folder: Path, size: int, rounds: int) -> tuple[Workspace, SimulatedOracle]:
    """A workspace with the first `size` e-mails by id and `rounds` published rounds."""
    corpus = prepare()
    rows = [json.loads(line) for line in corpus.pool.read_text(encoding="utf-8").splitlines()]
    write_jsonl(folder / "pool.jsonl", sorted(rows, key=lambda row: str(row["id"]))[:size])
    key = read_json(corpus.key)
    workspace = init(folder / "workspace", ["ham", "spam"], remote=str(folder / "remote"))
    text = workspace.layout.params.read_text(encoding="utf-8")
    for name, value in SETTINGS.items():
        text = re.sub(rf"(?m)^(  {name}:) \d+", rf"\1 {value}", text)
    workspace.layout.params.write_text(text, encoding="utf-8")
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [folder / "pool.jsonl"])
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle, on_progress=_tell)
    for _ in range(rounds):
        for push_key in oracle.queue(PERSON):
            oracle.answer(push_key, PERSON, key[push_key.rsplit(":", 1)[1]])
        tick(workspace, lambda: oracle, on_progress=_tell)
    return workspace, oracle


def _go_back(workspace: Workspace, oracle: SimulatedOracle) -> dict[str, object]:
    """Seconds of a dry run, a rollback of labels and model, and its undo; separately, the ticks that publish."""
    root, reason = workspace.layout.root, "to be measured"

    def timed_intervention(intervene: Callable[[Workspace, Dvc], Change]) -> float:
        begin = time.perf_counter()
        with open_dvc(open_workspace(root).layout) as dvc:
            intervene(open_workspace(root), dvc)
        return round(time.perf_counter() - begin, 3)

    def ticked() -> float:
        begin = time.perf_counter()
        if not tick(open_workspace(root), lambda: oracle, on_progress=_tell).published:
            raise SystemExit("the intervention was not carried out, so there is nothing to measure")
        return round(time.perf_counter() - begin, 3)

    back = partial(rollback, number=0, labels=True, model=True, params=False, reason=reason)
    return {
        "rollback_rehearsal_seconds": timed_intervention(partial(back, dry_run=True)),
        "rollback_seconds": timed_intervention(back),
        "rollback_tick_seconds": ticked(),
        "undo_seconds": timed_intervention(partial(undo, reason=reason)),
        "undo_tick_seconds": ticked(),
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
