"""Round turnaround: from the last answer to the next batch in Label Studio, at several sizes, beside its aims.

    python -m benchmarks.round [--sizes 5000 100000] [--history 500] [--repeats 2]
                                                               writes benchmarks/results/round.json

On real e-mails (see examples/spam/corpus.py), a real Label Studio and a real Prefect server. Each round is one
`al round` in a process of its own: first alone, then with the fork server for DVC and the stages that `al up` starts,
then as a flow run with the one for Prefect's engine, too; the difference is Prefect's. Then `al round` that finds
nothing new, and `al status`. The pool is encoded before the measurement.

The corpus has 6,046 e-mails. A larger pool has 5,000 of them, and passages of them whose vectors are planted; with
`--history`, there is one more column: the largest pool with so many published rounds of 100 answers each, in the
ledger, git, DVC and Label Studio. `benchmarks/round_pools.py` says how both are made.

At the first size, each stage is also run again on the same files without DVC, as a process and as a call in a warm
process; the differences are DVC's and the interpreter's. Memory is the peak of the resident set, as the kernel counts
it. Processor seconds are of the command and of what it starts; of a fork server, those of its forks, too; none of
Label Studio's and Prefect's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from al_pipeline.files import read_json, write_jsonl
from al_pipeline.integrations.forks import DVC, FLOWS, SERVER
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.operations.connect import connect
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.tick import tick
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
from benchmarks.round_pools import History, plant_vectors, rows_of
from examples.spam.annotators import Annotator, answer_round
from examples.spam.corpus import prepare

SETTINGS = {"test_size": 300, "seed_size": 40, "batch_size": 40}
"""As in the demo."""
AIMS = {
    "small": {"in process": 3.0, "as a flow": 5.0, "idle tick": 0.7, "status": 0.4},
    "large": {"in process": 4.0, "as a flow": 6.0, "idle tick": 0.7, "status": 0.4},
    "history": {"in process": 4.0, "as a flow": 6.0, "idle tick": 1.0, "status": 0.6},
}
"""Seconds, for a pool of at most `LARGE` items, for a larger one, and after hundreds of rounds."""
LARGE = 5000
REAL = 5000
"""E-mails in a pool that is larger than the corpus."""
SECONDS = 1800
NOTHING_TO_DO = 3
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
    """One `al round`: seconds of the process and of its steps, peak memory by kind of process, processor seconds."""

    wall: float
    steps: Mapping[str, float]
    peak_mib: Mapping[str, float]
    cpu: float


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
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000], help="items in the pool and the test set")
    parser.add_argument("--history", type=int, default=0, help="published rounds of one more column; 0: no such column")
    parser.add_argument("--answers", type=int, default=100, help="answers in each of those rounds")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of each kind")
    parser.add_argument("--name", default="round", help="name of the record in benchmarks/results")
    options = parser.parse_args()
    columns: dict[str, dict[str, Any]] = {}
    plan = [(f"{size:,} items", size, 0) for size in options.sizes]
    if options.history:
        plan.append((f"{options.history:,} rounds", max(options.sizes), options.history))
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder:
        vectors = Path(folder) / "vectors"
        for name, size, rounds in plan:
            tell(f"== {name}")
            own = Path(folder) / f"{size}-{rounds}"
            own.mkdir()
            with homes(own):
                column = Column(own, size, options.repeats, vectors)
                try:
                    columns[name] = column.measured(rounds, options.answers, with_stages=not columns)
                finally:
                    column.end()
            shutil.rmtree(own)
    rows = [row for name, column in columns.items() for row in beside_aims(name, column)]
    figures = {"settings": SETTINGS, "repeats": options.repeats, "table": rows, "columns": columns}
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(table(rows))  # noqa: T201
    print(record(options.name, figures).relative_to(ROOT))  # noqa: T201


class Column:
    """One workspace with its servers, and what is measured on it."""

    def __init__(self, folder: Path, size: int, repeats: int, vectors: Path) -> None:
        self._folder, self._size, self._repeats, self._vectors = folder, size, repeats, vectors
        self._workspace, self._key, self._mails = mail_pool(folder, size)
        self._asked = 0

    def measured(self, rounds: int, answers: int, *, with_stages: bool) -> dict[str, Any]:
        """All figures. `rounds`: so many are published before, of `answers` answers each."""
        workspace = self._workspace
        server = start_label_studio(workspace, tell)
        account = admin(workspace)
        assert account is not None
        self._url, self._person = server.url, Annotator(account.email, account.token, 0.0, 0.0, 0.0, 0.0)
        begin = time.perf_counter()
        first = self._first()
        if rounds:
            self._grow(rounds, answers)
        made = time.perf_counter() - begin
        self._round(), self._round()
        here = [self._round() for _ in range(self._repeats)]
        idle = [self._run("round") for _ in range(1 + self._repeats)][1:]
        status = [self._run("status") for _ in range(1 + self._repeats)][1:]
        stages = _stages(workspace, here) if with_stages else None
        _start_fork_servers(workspace)
        forked = [self._round() for _ in range(1 + self._repeats)][1:]
        start_prefect(workspace, tell)
        _start_fork_servers(workspace, prefect_environment(workspace))
        self._round()
        flows = [self._round() for _ in range(self._repeats)]
        found: dict[str, Any] = {
            "items": self._size,
            "published_rounds": self._asked,
            "made_in_seconds": round(made, 1),
            "turnaround_seconds": {
                "in_process": _summary(here),
                "with_fork_server": _summary(forked),
                "as_flow": _summary(flows),
            },
            "idle_tick": _plain(idle),
            "status": _plain(status),
            "prefect_overhead_seconds": round(_median(flows) - _median(forked), 3),
            "peak_rss_mib": {"in_process": _peaks(here), "with_fork_server": _peaks(forked), "as_flow": _peaks(flows)},
        }
        if first is not None:
            found["first_tick_seconds"] = {"wall": first.wall, **first.steps}
            found["peak_rss_mib"]["first_tick"] = dict(first.peak_mib)
        if stages is not None:
            found["dvc_overhead_seconds"] = round(sum(row["dvc"] for row in stages.values()), 3)
            found["start_up_seconds"] = round(sum(row["start_up"] for row in stages.values()), 3)
            found["stages"] = stages
        return found

    def end(self) -> None:
        """Stop the servers."""
        stop_fork_servers(self._workspace.home)
        stop_prefect(self._workspace)
        stop_label_studio(self._workspace)

    def _first(self) -> Tick | None:
        """The tick that builds, encodes and pushes the seed; None if vectors were planted before its step `encode`."""
        workspace, kept = self._workspace, self._vectors
        if self._size <= len(self._mails):
            found = _tick(workspace)
            if not kept.exists():
                shutil.copytree(workspace.layout.features, kept)
            return found

        def run(name: str, action: Callable[[], Any], /) -> Any:
            if name == "encode":
                if kept.exists():
                    shutil.copytree(kept, workspace.layout.features, dirs_exist_ok=True)
                plant_vectors(workspace, self._mails)
            return action()

        tick(workspace, lambda: connect(workspace), run=run)
        return None

    def _grow(self, rounds: int, answers: int) -> None:
        """Publish two rounds, then add a history that ends with an open round."""
        self._round(), self._round()
        self._answer()
        with httpx.Client(base_url=self._url, headers={"Authorization": f"Token {self._person.token}"}) as http:
            oracle = LabelStudioOracle(self._url, self._person.token, timeout=600)
            with oracle:
                History(self._workspace, oracle, http, self._key).grow(rounds, answers, SETTINGS["batch_size"], tell)
        self._asked = rounds
        tell(f"the first tick after the history: {_tick(self._workspace).wall:.1f} s")

    def _answer(self) -> None:
        project = read_json(self._workspace.layout.project)["project_id"]
        answer_round(self._url, project, [self._person], self._key, 0, round_number=self._asked)

    def _round(self) -> Tick:
        """Answer the open round completely, then time the tick that closes it and pushes the next."""
        self._answer()
        found = _tick(self._workspace)
        tell(f"round {self._asked}: {found.wall:.1f} s, {found.cpu:.1f} CPU s")
        self._asked += 1
        return found

    def _run(self, command: str) -> tuple[float, float]:
        """Seconds and processor seconds of a command that finds nothing to do."""
        words = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(self._workspace.layout.root), command, "--json"]
        before, begin = spent(), time.perf_counter()
        done = subprocess.run(words, stdout=subprocess.PIPE, timeout=SECONDS, env=_environment())
        wall = time.perf_counter() - begin
        if done.returncode not in (0, NOTHING_TO_DO):
            raise SystemExit(f"`al {command}` ended with {done.returncode}: {done.stdout.decode()}")
        tell(f"al {command}: {wall:.2f} s")
        return wall, spent() - before


def beside_aims(name: str, column: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table for one column."""
    aims = AIMS["history" if name.endswith("rounds") else "large" if column["items"] > LARGE else "small"]
    turnaround = column["turnaround_seconds"]
    found = {
        "in process": turnaround["in_process"],
        "as a flow": turnaround["as_flow"],
        "idle tick": column["idle_tick"],
        "status": column["status"],
    }
    return [
        {
            "column": name,
            "what": what,
            "seconds": found[what]["wall"],
            "aim": aim,
            "of_aim": round(found[what]["wall"] / aim, 2),
            "cpu_seconds": found[what]["cpu_seconds"],
        }
        for what, aim in aims.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as lines."""
    lines = [f"{'':>16} {'':>10} {'s':>7} {'aim':>5} {'of aim':>7} {'CPU s':>6}"]
    lines += [
        f"{row['column']:>16} {row['what']:>10} {row['seconds']:>7.2f} {row['aim']:>5} {row['of_aim']:>7} "
        f"{row['cpu_seconds']:>6}"
        for row in rows
    ]
    return "\n".join(lines)


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
    return mail_pool(folder, size)[:2]


def mail_pool(folder: Path, size: int) -> tuple[Workspace, dict[str, str], list[str]]:
    """A workspace of `size` items, the right labels, and the texts of the e-mails among them.

    More items than the corpus has: `REAL` e-mails, and passages of them.
    """
    corpus = prepare()
    mails = [json.loads(line) for line in corpus.pool.read_text(encoding="utf-8").splitlines()]
    key = read_json(corpus.key)
    if size > len(mails):
        mails = sorted(mails, key=lambda row: str(row["id"]))[:REAL]
    rows, key = rows_of(mails, key, size)
    write_jsonl(folder / "pool.jsonl", rows)
    workspace = init(folder / "workspace", ["ham", "spam"], remote=str(folder / "remote"))
    params = workspace.layout.params
    text = params.read_text(encoding="utf-8")
    for name, value in SETTINGS.items():
        text = re.sub(rf"(?m)^(  {name}:) \d+", rf"\1 {value}", text)
    params.write_text(text, encoding="utf-8")
    workspace = open_workspace(workspace.layout.root)
    ingest(workspace, [folder / "pool.jsonl"])
    return workspace, key, [row["text"] for row in rows[: len(mails)]]


def _start_fork_servers(workspace: Workspace, prefect: Mapping[str, str] | None = None) -> None:
    """Start the workspace's fork servers as `al up` does, and wait until they have imported."""
    start_fork_servers(workspace, prefect)
    for name in (DVC, *([FLOWS] if prefect else [])):
        while not (fork_servers(workspace.id) / name / "socket").exists():
            time.sleep(_LOOK_SECONDS)


def _tick(workspace: Workspace) -> Tick:
    command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(workspace.layout.root), "round", "--json"]
    cpu, begin = spent() + _of_fork_servers(workspace), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        memory = Memory(process.pid)
        watching = threading.Thread(target=memory.watch)
        watching.start()
        out, _ = process.communicate(timeout=SECONDS)
        wall = time.perf_counter() - begin
        watching.join()
    if process.returncode:
        raise SystemExit(f"`al round` ended with {process.returncode}: {out}")
    steps = {name: round(seconds, 3) for name, seconds in json.loads(out)["steps"].items()}
    used = spent() + _of_fork_servers(workspace) - cpu
    return Tick(round(wall, 3), steps, memory.peak_mib, round(used, 3))


def spent() -> float:
    """Processor seconds of all children that have ended, and of their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """Bytecode is kept between runs, as in any installation."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _of_fork_servers(workspace: Workspace) -> float:
    """Processor seconds of the workspace's fork servers and of their forks that have ended."""
    folder = str(fork_servers(workspace.id))
    total = 0.0
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        words, times = process.info["cmdline"] or [], process.info["cpu_times"]
        if SERVER in words and any(word.startswith(folder) for word in words) and times is not None:
            total += times.user + times.system + times.children_user + times.children_system
    return total


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
        "cpu_seconds": round(median(tick.cpu for tick in ticks), 2),
        "steps": steps,
        "outside_steps": round(wall - sum(steps.values()), 3),
    }


def _plain(runs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {
        "wall": round(median(wall for wall, _ in runs), 3),
        "runs": [round(wall, 3) for wall, _ in runs],
        "cpu_seconds": round(median(cpu for _, cpu in runs), 2),
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
