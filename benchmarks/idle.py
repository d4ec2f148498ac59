"""What waiting costs: processor seconds of commands that are called often, wall time of two that take long.

    python -m benchmarks.idle [--size 2000] [--repeats 5]      writes benchmarks/results/idle.json

On real e-mails, with a real Label Studio and one round open in it: `al round` that finds no new answer, `al status`,
`al pause` and `al resume`, each as a process of its own. Processor seconds are the user and system time of the command
and of every process that it starts (git, DVC), without Label Studio's own. For comparison, the lower limit: a Python
process that imports the libraries of any command line of this kind (typer, rich, msgspec, PyYAML) and exits. Python
keeps its bytecode between the runs, as in any installation.

Then, once each: `al rollback 0 --labels` after two published rounds, and `al up` if Label Studio is installed and
nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from al_pipeline.files import read_json
from al_pipeline.servers import admin, start_label_studio
from al_pipeline.workspace.workspace import Workspace
from benchmarks.record import ROOT, record
from benchmarks.round import SECONDS, homes, mail_workspace, tell
from examples.spam.annotators import Annotator, answer_round

LIMIT = (sys.executable, "-c", "import typer, rich.console, rich.table, msgspec, yaml")
COMMANDS = {
    "round": ["round"],
    "status": ["status"],
    "pause": ["pause", "--reason", "a benchmark"],
    "resume": ["resume"],
}
"""Run in this order, so that each pause is followed by a resume."""
NOTHING_TO_DO = 3


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2000, help="e-mails in the pool and the test set")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command")
    options = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*COMMANDS, "limit")}
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder, homes(Path(folder)):
        workspace, truth = mail_workspace(Path(folder), options.size)
        al = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(workspace.layout.root)]
        try:
            start_label_studio(workspace, tell)
            _run([*al, "round"])  # builds, encodes, pushes
            _run([*al, "status"])  # writes bytecode
            for _ in range(options.repeats):
                runs["limit"].append(_run(LIMIT))
                for name, arguments in COMMANDS.items():
                    runs[name].append(_run([*al, *arguments]))
                tell(", ".join(f"{name} {found[-1][0]:.2f} s" for name, found in runs.items()))
            long = {"rollback": _rollback(workspace, truth, al), "up": _up(al)}
        finally:
            _run([*al, "down"])
    limit = median(cpu for cpu, _ in runs["limit"])
    figures = {
        "items": options.size,
        "repeats": options.repeats,
        "commands": {
            name: {
                "cpu_seconds": round(median(cpu for cpu, _ in found), 3),
                "wall_seconds": round(median(wall for _, wall in found), 3),
                "of_limit": round(median(cpu for cpu, _ in found) / limit, 2),
            }
            for name, found in runs.items()
        },
        "once": long,
    }
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("idle", figures).relative_to(ROOT))  # noqa: T201


def _rollback(workspace: Workspace, truth: Mapping[str, str], al: Sequence[str]) -> dict[str, float]:
    """Publish two rounds, and roll the labels back to the first."""
    account = admin(workspace)
    assert account is not None
    person = Annotator(account.email, account.token, 0.0, 0.0, 0.0, 0.0)
    project = read_json(workspace.layout.project)["project_id"]
    for number in range(2):
        answer_round(workspace.credentials()["url"], project, [person], truth, 0, round_number=number)
        _run([*al, "round"])
    cpu, wall = _run([*al, "rollback", "0", "--labels", "--reason", "a benchmark"])
    return {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}


def _up(al: Sequence[str]) -> dict[str, float]:
    """Start everything when nothing runs."""
    _run([*al, "down"])
    cpu, wall = _run([*al, "up"])
    return {"cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Processor seconds of a command with everything that it started, and its wall seconds."""
    before, begin = _spent(), time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS, env=environment)
    wall = time.perf_counter() - begin
    if done.returncode not in (0, NOTHING_TO_DO):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
    return _spent() - before, wall


def _spent() -> float:
    """Processor seconds of all children that have ended, and of their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
