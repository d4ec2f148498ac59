"""Provenance of our figures: what was run, on which commit, on what machine.

A benchmark calls `record("train_speed", {"seconds": 1.9})` and quotes `benchmarks/results/train_speed.json`.
Run benchmarks from the repository's root as modules: `python -m benchmarks.train_speed`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from al_pipeline.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("al-pipeline", "dvc", "label-studio-sdk", "numpy", "prefect", "scikit-learn", "torch", "transformers")
_GIT_SECONDS = 30
_ABSOLUTE = re.compile(r"(?<![\w./])/[\w.~+-]+(?:/[\w.~+-]*)*")


def record(name: str, figures: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """Write `figures` with command, commit, date and machine to `<results>/<name>.json`; return its path.

    Raises ValueError if the name is not a plain file name, a figure is not finite, or a figure contains a path of this
    machine.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"a record's name takes a-z, 0-9, _ and -, got {name!r}")
    told = json.dumps(figures, allow_nan=False)
    for place in (str(ROOT), str(Path.home())):
        if f"{place}/" in told:
            raise ValueError(f"the figures of {name} contain a path of this machine ({place}/…): leave it out")
    path = results / f"{name}.json"
    paper = {
        "command": command(sys.argv),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "figures": dict(figures),
    }
    write_json(path, paper)
    return path


def command(argv: Sequence[str], root: Path = ROOT) -> str:
    """The command line, with paths below `root` relative to it and other absolute paths cut to their last name."""
    return " ".join(["python" if argv[0].endswith(".py") else "", *(_portable(word, root) for word in argv)]).strip()


def _portable(word: str, root: Path) -> str:
    def shorten(match: re.Match[str]) -> str:
        path = Path(match.group())
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    return _ABSOLUTE.sub(shorten, word)


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it (except benchmarks' results and pictures)."""
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)docs/*.png")
    return {"id": head, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    """The output of a git command; None if there is no repository (a copy of the sources) or no git."""
    try:
        done = subprocess.run(("git", *words), cwd=root, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, usable cores, memory, versions. No host name, no path."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
