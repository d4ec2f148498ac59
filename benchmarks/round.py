"""Round turnaround: from the last answer to the next batch in Label Studio, by step, and which system takes the time.

    python -m benchmarks.round [--size 2000] [--repeats 2]      writes benchmarks/results/round.json

On real e-mails (see examples/spam/corpus.py), a real Label Studio and a real Prefect server. Each round is one
`al round` in a process of its own: first alone, then with the fork server for DVC and the stages that `al up` starts,
then as a flow run with the one for Prefect's engine, too; the difference is Prefect's. Each stage is then run again on
the same files without DVC, as a process and as a call in a warm process; the differences are DVC's and the
interpreter's. The pool is encoded before the measurement. Memory is the peak of the resident set, as the kernel counts
it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from al_pipeline.files import read_json, write_jsonl
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.servers import (
    admin,
    prefect_environment,
    start_label_studio,
    start_prefect,
    stop_label_studio,
    stop_prefect,
)
from al_pipeline.servers.fork_server import start_fork_servers, stop_fork_servers
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import fork_servers
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.workspace import Workspace, open_workspace
from benchmarks.record import ROOT, record
from examples.spam.annotators import Annotator, answer_round
from examples.spam.corpus import prepare

SETTINGS = {"test_size": 300, "seed_size": 40, "batch_size": 40}
"""As in the demo."""
SECONDS = 1800
_LOOK_SECONDS = 0.1

CALLS = """
import json, time
from importlib import import_module
from al_pipeline.workspace.layout import STAGES, Layout
mains = {name: import_module(f"al_pipeline.stages.{name}").main for name in STAGES}
mains["label"](Layout())
seconds = {}
for name in STAGES:
    mains[name](Layout())
    begin = time.perf_counter()
    mains[name](Layout())
    seconds[name] = time.perf_counter() - begin
print(json.dumps(seconds))
"""
"""Each stage as a call, twice in one process: the second call has all imports done."""


BARE = """
import re, runpy, sys
runpy.run_module(sys.argv[1], run_name="__main__")
print(re.search(r"VmHWM:.*", open("/proc/self/status").read())[0])
"""
"""A stage as a process, and its peak memory. (What `wait4` reports begins with the peak of the forking process.)"""


@dataclass(frozen=True)
class Tick:
    """One `al round`: seconds of the whole process and of its steps, and peak memory by kind of process."""

    wall: float
    steps: Mapping[str, float]
    peak_mib: Mapping[str, float]


@dataclass
class Memory:
    """Peak memory of a process and of its descendants, while they live."""

    pid: int
    peak_mib: dict[str, float] = field(default_factory=dict)

    def watch(self) -> None:
        """Sample until the process has ended."""
        while psutil.pid_exists(self.pid):
            try:
                process = psutil.Process(self.pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    return
                for one in [process, *process.children(recursive=True)]:
                    self._look(one)
            except psutil.Error:
                pass
            time.sleep(_LOOK_SECONDS)

    def _look(self, process: psutil.Process) -> None:
        try:
            words = f"{process.name()} {' '.join(process.cmdline())}"
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
        except (psutil.Error, OSError):
            return
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            name = "tick" if process.pid == self.pid else _kind(words)
            self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), round(int(found[1]) / 1024, 1))


def _kind(words: str) -> str:
    stage = re.match(r"al-(\w+)", words) or re.search(r"-m al_pipeline\.stages\.(\w+)", words)
    if stage:
        return stage[1]  # a fork of the stage server, which renames itself, or a separate process
    if "dvc.stage_server" in words:
        return "stage server"
    return "dvc" if "dvc.worker" in words else "git and others"


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2000, help="e-mails in the pool and the test set")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder, homes(Path(folder)):
        workspace, key = mail_workspace(Path(folder), options.size)
        try:
            url = start_label_studio(workspace, tell).url
            account = admin(workspace)
            assert account is not None
            person = Annotator(account.email, account.token, 0.0, 0.0, 0.0, 0.0)
            encode = _tick(workspace)  # builds, encodes, pushes
            here = [_round(workspace, url, person, key, number) for number in range(1 + options.repeats)][1:]
            _start_fork_servers(workspace)
            asked = 1 + options.repeats
            forked = [_round(workspace, url, person, key, asked + number) for number in range(1 + options.repeats)][1:]
            start_prefect(workspace, tell)
            _start_fork_servers(workspace, prefect_environment(workspace))
            asked += 1 + options.repeats
            flows = [_round(workspace, url, person, key, asked + number) for number in range(options.repeats)]
        finally:
            stop_fork_servers(workspace.home)
            stop_prefect(workspace)
            stop_label_studio(workspace)
        stages = _stages(workspace, here)
    figures = {
        "items": options.size,
        "settings": SETTINGS,
        "repeats": options.repeats,
        "first_tick_seconds": {"wall": encode.wall, **encode.steps},
        "turnaround_seconds": {
            "in_process": _summary(here),
            "with_fork_server": _summary(forked),
            "as_flow": _summary(flows),
        },
        "prefect_overhead_seconds": round(_median(flows) - _median(forked), 3),
        "dvc_overhead_seconds": round(sum(row["dvc"] for row in stages.values()), 3),
        "start_up_seconds": round(sum(row["start_up"] for row in stages.values()), 3),
        "stages": stages,
        "peak_rss_mib": {
            "first_tick": dict(encode.peak_mib),
            "in_process": _peaks(here),
            "with_fork_server": _peaks(forked),
            "as_flow": _peaks(flows),
        },
    }
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("round", figures).relative_to(ROOT))  # noqa: T201


@contextmanager
def homes(folder: Path) -> Iterator[None]:
    """A home for the servers of the benchmark; Label Studio's environment and empty database are kept between runs."""
    environment = ROOT / ".venv-label-studio"
    if environment.is_dir():
        os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(environment))
    kept = ROOT / ".cache/benchmarks/templates"
    kept.mkdir(parents=True, exist_ok=True)
    os.environ["AL_HOME"] = str(folder / "home")
    (folder / "home").mkdir()
    shutil.copytree(kept, folder / "home/templates")
    yield
    shutil.copytree(folder / "home/templates", kept, dirs_exist_ok=True)


def mail_workspace(folder: Path, size: int) -> tuple[Workspace, dict[str, str]]:
    """A workspace with the first `size` e-mails by id, and the right labels."""
    corpus = prepare()
    rows = [json.loads(line) for line in corpus.pool.read_text(encoding="utf-8").splitlines()]
    write_jsonl(folder / "pool.jsonl", sorted(rows, key=lambda row: str(row["id"]))[:size])
    workspace = init(folder / "workspace", ["ham", "spam"], remote=str(folder / "remote"))
    params = workspace.layout.params
    text = params.read_text(encoding="utf-8")
    for name, value in SETTINGS.items():
        text = re.sub(rf"(?m)^(  {name}:) \d+", rf"\1 {value}", text)
    params.write_text(text, encoding="utf-8")
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [folder / "pool.jsonl"])
    return workspace, read_json(corpus.key)


def _start_fork_servers(workspace: Workspace, prefect: Mapping[str, str] | None = None) -> None:
    """Start the workspace's fork servers as `al up` does, and wait until they have imported."""
    start_fork_servers(workspace, prefect)
    for name in ("dvc", *(["flows"] if prefect else [])):
        while not (fork_servers(workspace.id) / name / "socket").exists():
            time.sleep(_LOOK_SECONDS)


def _round(workspace: Workspace, url: str, person: Annotator, key: Mapping[str, str], number: int) -> Tick:
    """Answer round `number` completely, then time the tick that closes it and pushes the next."""
    project = read_json(workspace.layout.project)["project_id"]
    answer_round(url, project, [person], key, 0, round_number=number)
    tick = _tick(workspace)
    tell(f"round {number}: {tick.wall:.1f} s")
    return tick


def _tick(workspace: Workspace) -> Tick:
    command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(workspace.layout.root), "round", "--json"]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = Memory(process.pid)
        watching = threading.Thread(target=memory.watch)
        watching.start()
        out, _ = process.communicate(timeout=SECONDS)
        wall = time.perf_counter() - begin
        watching.join()
    if process.returncode:
        raise SystemExit(f"`al round` ended with {process.returncode}: {out}")
    steps = {name: round(seconds, 3) for name, seconds in json.loads(out)["steps"].items()}
    return Tick(round(wall, 3), steps, memory.peak_mib)


def _stages(workspace: Workspace, ticks: Sequence[Tick]) -> dict[str, dict[str, float]]:
    """Each stage's seconds as a step of a tick, as a bare process and as a warm call, and its peak memory."""
    root = workspace.layout.root
    environment = {**os.environ, **STAGE_ENVIRONMENT}
    calls = [sys.executable, "-c", CALLS]
    done = subprocess.run(calls, cwd=root, env=environment, stdout=subprocess.PIPE, check=True, timeout=SECONDS)
    warm = json.loads(done.stdout)
    rows = {}
    for name in STAGES:
        runs = [_bare(name, root, environment) for _ in range(3)]
        step, process = median(tick.steps[name] for tick in ticks), median(seconds for seconds, _ in runs)
        rows[name] = {
            "step": round(step, 3),
            "process": round(process, 3),
            "call": round(warm[name], 3),
            "dvc": round(step - process, 3),
            "start_up": round(process - warm[name], 3),
            "peak_rss_mib": max(mib for _, mib in runs),
        }
    return rows


def _bare(name: str, root: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of a stage as a process of its own, without DVC."""
    begin = time.perf_counter()
    command = [sys.executable, "-c", BARE, f"al_pipeline.stages.{name}"]
    done = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS
    )
    return time.perf_counter() - begin, round(int(done.stdout.split()[-2]) / 1024, 1)


def _summary(ticks: Sequence[Tick]) -> dict[str, Any]:
    names = dict.fromkeys(name for tick in ticks for name in tick.steps)
    steps = {name: round(median(tick.steps.get(name, 0.0) for tick in ticks), 3) for name in names}
    wall = _median(ticks)
    return {
        "wall": wall,
        "runs": [tick.wall for tick in ticks],
        "steps": steps,
        "outside_steps": round(wall - sum(steps.values()), 3),
    }


def _median(ticks: Sequence[Tick]) -> float:
    return round(median(tick.wall for tick in ticks), 3)


def _peaks(ticks: Sequence[Tick]) -> dict[str, float]:
    names = sorted({name for tick in ticks for name in tick.peak_mib})
    return {name: max(tick.peak_mib.get(name, 0.0) for tick in ticks) for name in names}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
