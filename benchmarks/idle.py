"""What it costs to look: processor seconds of the commands that people and schedules call again and again.

    python -m benchmarks.idle [--size 2000] [--repeats 5]      writes benchmarks/results/idle.json

On real e-mails, with a real Label Studio and one round open in it: `al round` that finds no new answer, `al status`,
`al pause` and `al resume`, each as a process of its own. Processor seconds are the user and system time of the command
and of every process that it starts (git, DVC); Label Studio's own are not among them. Beside them, as the limit, a
Python that imports the libraries of any command line of this kind (typer, rich, pydantic, PyYAML) and ends.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from al_pipeline.servers import start_label_studio, stop_label_studio
from benchmarks.record import ROOT, record
from benchmarks.round import SECONDS, homes, mail_workspace, tell

LIMIT = (sys.executable, "-c", "import typer, rich.console, rich.table, pydantic, yaml")
COMMANDS = {
    "round": ["round"],
    "status": ["status"],
    "pause": ["pause", "--reason", "a benchmark"],
    "resume": ["resume"],
}
"""Played in this order, so that a pause is always taken back."""
NOTHING_TO_DO = 3


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2000, help="e-mails in the pool and the test set")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command")
    options = parser.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*COMMANDS, "limit")}
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder, homes(Path(folder)):
        workspace, _ = mail_workspace(Path(folder), options.size)
        al = [sys.executable, "-m", "al_pipeline.cli", "-C", str(workspace.layout.root)]
        try:
            start_label_studio(workspace, tell)
            _run([*al, "round"])  # builds, encodes, asks
            for _ in range(options.repeats):
                runs["limit"].append(_run(LIMIT))
                for name, arguments in COMMANDS.items():
                    runs[name].append(_run([*al, *arguments]))
                tell(", ".join(f"{name} {found[-1][0]:.2f} s" for name, found in runs.items()))
        finally:
            stop_label_studio(workspace)
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
    }
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("idle", figures).relative_to(ROOT))  # noqa: T201


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Processor seconds of a command with all that it started, and its wall seconds."""
    before, begin = _spent(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    wall = time.perf_counter() - begin
    if done.returncode not in (0, NOTHING_TO_DO):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}")
    return _spent() - before, wall


def _spent() -> float:
    """Processor seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
