"""One round at several pool sizes: seconds, memory and disk of each step, up to ten million short texts.

    python -m benchmarks.scale [--items 100000 1000000] [--folder DIR]      writes benchmarks/results/scale.json

At each size: `al ingest` of one Parquet file (id, text of 10 to 25 words, one other column); the first tick, which
builds and pushes the seed; the tick that closes the seed round and trains the first model; the tick that closes the
next round, of 40 pool items and 40 test items; `al status`; a tick that finds nothing new. Each is a process of its
own, without fork servers. Label Studio is simulated in memory.

The vectors are planted: a direction for each class, and noise. The step `encode` is all that the first encoding does
beside the encoder's own work (reading the pool, finding what is missing, writing the cache), so its seconds leave out
the time in which the planted vectors are made, and that of TF-IDF's vocabulary and rows, which is the step `terms`.
What the encoder itself would take is estimated: a sample of the texts is encoded in truth, and its seconds are
multiplied.

At the end, the stages are run again without the caches of TF-IDF rows and of the vectors' index: every byte must be the
same.

Processor seconds are of the step's process and of all that it starts. Memory is the peak of the largest process: of its
resident set, which counts pages of memory-mapped files that the kernel can drop, and of its anonymous memory, sampled.
Disk is what the workspace and the DVC remote hold after the step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from al_pipeline.files import disk_usage, sha256_tree
from al_pipeline.workspace.layout import Layout
from benchmarks.record import ROOT, record

SIZES = [100_000, 1_000_000]
CLASSES = ("ham", "spam")
ANNOTATOR = "ann@example.org"
WIDTH = 384
"""Width of a planted vector: that of the default encoder."""
SAMPLE = 1024
CHUNK = 100_000
SECONDS = 24 * 3600
_LOOK_SECONDS = 0.05
_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER, see prctl(2)."""
_DISK = ("pool", "dvc_cache", "remote", "vectors", "terms")

Figures = dict[str, Any]


def main() -> None:
    """Run the benchmark, or (`--step`) one step of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=SIZES, help="sizes of the pool")
    parser.add_argument("--folder", type=Path, help="where to work: about 3.5 kB of disk for each item, for a while")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="texts that are encoded in truth")
    parser.add_argument("--name", default="scale", help="name of the record in benchmarks/results")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options)))  # noqa: T201
        return
    adopt_orphans()
    rows = []
    with progress(len(options.items) * len(PLAN)) as tell:
        for items in options.items:
            with tempfile.TemporaryDirectory(prefix="al-benchmark-", dir=options.folder) as folder:
                rows.append(at_size(Path(folder), items, options.sample, tell))
    figures = {"width": WIDTH, "sample": options.sample, "sizes": rows}
    print(table(rows))  # noqa: T201
    print(record(options.name, figures).relative_to(ROOT))  # noqa: T201


PLAN = ("source", "rate", "ingest", "first", "close_seed", "close", "status", "idle", "cold")
MEASURED = ("ingest", "encode", "terms", "first", "close_seed", "close", "status", "idle")


def at_size(folder: Path, items: int, sample: int, tell: Callable[[str], None]) -> Figures:
    """All figures of one size."""
    steps: dict[str, Figures] = {}
    seconds_a_text = 0.0
    for name in PLAN:
        tell(f"{items:,} items: {name}")
        found = run_step(name, folder, items, sample)
        if name == "rate":
            seconds_a_text = found["reply"]["seconds_a_text"]
        elif name in MEASURED:
            found["disk_gb"] = disk(folder)
            if planted := found.pop("reply").get("encode"):
                for key in ("seconds", "cpu_seconds"):
                    found[key] = round(found[key] - planted.pop(f"whole_{key}"), 2)
                terms = planted.pop("terms")
                steps["terms"] = {**planted, **terms}
                steps["encode"] = planted
            steps[name] = found
    return {
        "items": items,
        "steps": {name: steps[name] for name in MEASURED},
        "ingested_rows_per_cpu_second": round(items / steps["ingest"]["cpu_seconds"]),
        "encoder_texts_per_second": round(1 / seconds_a_text, 1),
        "encoder_hours_estimated": round(seconds_a_text * items / 3600, 2),
    }


def run_step(name: str, folder: Path, items: int, sample: int) -> Figures:
    """Run a step as a process: its reply, seconds, processor seconds and peak memory."""
    words = [sys.executable, "-m", "benchmarks.scale", "--step", name, "--folder", str(folder)]
    words += ["--items", str(items), "--sample", str(sample)]
    if name == "status":
        words = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(folder / "workspace"), "status", "--json"]
    environment = {**os.environ, "AL_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, begin = spent(), time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        memory = Memory(process.pid)
        out, _ = process.communicate(timeout=SECONDS)
        wall = time.perf_counter() - begin
        peaks = memory.end()
    if process.returncode:
        raise SystemExit(f"the step {name} ended with {process.returncode}: {out}")
    figures = {"seconds": round(wall, 2), "cpu_seconds": round(spent() - before, 2), **peaks}
    reply = json.loads(out)
    return {**figures, **reply.pop("figures", {}), "reply": reply}


class Memory:
    """Peak memory of the largest of a process and its descendants, sampled until `end`; without a planting process."""

    def __init__(self, pid: int) -> None:
        self._pid, self._rss, self._anonymous, self._largest = pid, 0.0, 0.0, ""
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def end(self) -> Figures:
        """The peaks in MiB, and which process had the largest resident set."""
        self._ended.set()
        self._watcher.join()
        return {
            "peak_rss_mib": round(self._rss),
            "peak_anonymous_mib": round(self._anonymous),
            "largest_process": self._largest,
        }

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            try:
                process = psutil.Process(self._pid)
                for one in [process, *process.children(recursive=True)]:
                    self._look(one.pid)
            except psutil.Error:
                pass

    def _look(self, pid: int) -> None:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return
        if pid != self._pid and "plant" in words:
            return
        pairs = (line.partition(":") for line in lines)
        found = {name: int(value.split()[0]) / 1024 for name, _, value in pairs if name in ("VmHWM", "RssAnon")}
        if found.get("VmHWM", 0.0) > self._rss:
            self._rss = found["VmHWM"]
            self._largest = next(
                (word for word in words if word.startswith(("al-", "al_pipeline."))), "the step itself"
            )
        self._anonymous = max(self._anonymous, found.get("RssAnon", 0.0))


def adopt_orphans() -> None:
    """Make processes whose parent has ended children of this one, so that `spent` counts them."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def spent() -> float:
    """Processor seconds of all children that have ended, and of their children."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def disk(folder: Path) -> Figures:
    """Gigabytes (10^9) that each part takes."""
    root, layout = folder / "workspace", Layout(folder / "workspace")
    places = {
        "pool": (layout.pool, layout.test, layout.inbox),
        "dvc_cache": (root / ".dvc/cache",),
        "remote": (folder / "remote",),
        "vectors": (layout.features,),
        "terms": (layout.terms,),
    }
    return {name: round(sum(disk_usage(path) for path in places[name]) / 1e9, 3) for name in _DISK}


# The steps -----------------------------------------------------------------------------------------------------------
def write_source(folder: Path, options: argparse.Namespace) -> Figures:
    """A Parquet file of texts, and an empty workspace."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from al_pipeline.operations.init import init

    rng = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 5000)]
    words[:50] = [f"{word}é" for word in words[:50]]
    phrases = [
        " ".join(words[int(row)] for row in (5000 * rng.random(size) ** 2)) for size in rng.integers(3, 9, 20000)
    ]
    items = options.items[0]
    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])
    with pq.ParquetWriter(folder / "pool.parquet", schema) as writer:
        for start in range(0, items, CHUNK):
            numbers = range(start, min(items, start + CHUNK))
            picks = rng.integers(0, len(phrases), (len(numbers), 3)).tolist()
            texts = [f"{n} {phrases[a]} {phrases[b]} {phrases[c]}" for n, (a, b, c) in zip(numbers, picks, strict=True)]
            ids = [f"m-{number:08d}" for number in numbers]
            kinds = [("web", "mail", "app")[number % 3] for number in numbers]
            writer.write_batch(pa.record_batch([ids, texts, kinds], schema=schema))
    (folder / "home").mkdir()
    init(folder / "workspace", CLASSES, remote=str(folder / "remote"))
    with (folder / "oracle.pickle").open("wb") as out:
        from al_pipeline.integrations.simulated_oracle import SimulatedOracle

        pickle.dump(SimulatedOracle(), out)
    return {}


def measure_rate(folder: Path, options: argparse.Namespace) -> Figures:
    """The true encoder's seconds for a text of the source, from a sample; after a few texts that warm it up."""
    import pyarrow.parquet as pq

    from al_pipeline.features.encoder import Encoder, install_encoder
    from al_pipeline.params import load_params

    features = load_params(folder / "workspace/params.yaml").features
    install_encoder(features.encoder, folder / "encoder")
    with pq.ParquetFile(folder / "pool.parquet") as file:
        batch = next(file.iter_batches(batch_size=options.sample + 64, columns=["text"]))
    texts = batch.column("text").to_pylist()
    encoder = Encoder(folder / "encoder", features.max_tokens, features.precision)
    encoder.encode(texts[:64])
    begin = time.perf_counter()
    encoder.encode(texts[64:])
    return {"seconds_a_text": (time.perf_counter() - begin) / (len(texts) - 64)}


def take_in(folder: Path, options: argparse.Namespace) -> Figures:
    """`al ingest`."""
    from al_pipeline.operations.ingest import ingest
    from al_pipeline.workspace.workspace import open_workspace

    report = ingest(open_workspace(folder / "workspace"), [folder / "pool.parquet"])
    assert report.added + report.test_added == options.items[0], report
    return {}


class PlantedEncoder:
    """Vectors of a text by the number that it begins with; knows the seconds that it took."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._directions = np.random.default_rng(2).standard_normal((len(CLASSES), WIDTH), np.float32) / 8
        self._noise = np.random.default_rng(3).standard_normal((CHUNK, WIDTH), np.float32)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Unit vectors, (n, WIDTH)."""
        begin, cpu = time.perf_counter(), time.process_time()
        numbers = np.array([int(text.partition(" ")[0]) for text in texts])
        rows: NDArray[np.float32] = self._noise[numbers % CHUNK] + self._directions[class_of(numbers)]
        rows[:, 0] += numbers // CHUNK / 100
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.seconds += time.perf_counter() - begin
        self.cpu_seconds += time.process_time() - cpu
        return rows


def class_of(numbers: Any) -> Any:
    """The class of an item by its number: three in ten are spam."""
    return (numbers * 7 % 10 < 3) * 1


def plant(folder: Path, options: argparse.Namespace) -> Figures:
    """What the step `encode` of a tick does, with planted vectors."""
    from al_pipeline.features.vectors import Vectors
    from al_pipeline.stages import encode

    encoder = PlantedEncoder()
    Vectors._encoder = lambda _: encoder  # type: ignore[assignment,method-assign,return-value]
    fill_terms = encode._fill_terms
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    def measured(layout: Layout) -> None:
        mark()
        fill_terms(layout)
        mark()

    encode._fill_terms = measured
    mark()
    done = encode.main(Layout(folder / "workspace"))
    assert done == options.items[0], done
    begin, between, end = np.array(marks)
    own = between - begin - (encoder.seconds, encoder.cpu_seconds)
    names = ("seconds", "cpu_seconds")
    return {
        "figures": dict(zip(names, own.round(2).tolist(), strict=True)),
        "whole": {f"whole_{name}": seconds for name, seconds in zip(names, (end - begin).tolist(), strict=True)},
        "terms": dict(zip(names, (end - between).round(2).tolist(), strict=True)),
    }


def run_tick(folder: Path, options: argparse.Namespace, answer: bool = False) -> Figures:
    """Answer what is open if `answer`, then time a tick; the first one plants the vectors before its step `encode`."""
    from al_pipeline.operations.tick import tick
    from al_pipeline.workspace.workspace import open_workspace

    os.chdir(folder / "workspace")
    with (folder / "oracle.pickle").open("rb") as file:
        oracle = pickle.load(file)  # noqa: S301 our own file
    planted: Figures = {}

    def run(name: str, action: Callable[[], Any], /) -> Any:
        if name == "encode" and not (folder / "planted").exists():
            found = run_step("plant", folder, options.items[0], options.sample)
            reply = found.pop("reply")
            planted.update({**found, **reply["whole"], "terms": reply["terms"]})
            (folder / "planted").touch()
        return action()

    if answer:
        for key in oracle.queue(ANNOTATOR):
            number = int(key.rsplit("-", 1)[1])
            oracle.answer(key, ANNOTATOR, CLASSES[class_of(number)])
    report = tick(open_workspace(folder / "workspace"), lambda: oracle, run=run)
    with (folder / "oracle.pickle").open("wb") as out:
        pickle.dump(oracle, out)
    seconds: dict[str, float] = {}
    for step, took in report.steps:
        seconds[step] = round(seconds.get(step, 0.0) + took, 2)
    if planted:
        seconds["encode"] = round(seconds["encode"] - planted["whole_seconds"], 2)
    return {"figures": {"parts": seconds}, "encode": planted}


def rebuild(folder: Path, options: argparse.Namespace) -> Figures:
    """Run the stages of the newest round again with no cache but the vectors. Fails if a byte of an output differs."""
    from al_pipeline.stages import evaluate, score, select, train

    layout = Layout(folder / "workspace")
    outputs = (layout.model, layout.predictions, layout.scores, layout.histogram, layout.queries, layout.choice)
    before = {path.name: sha256_tree(path) for path in outputs}
    shutil.rmtree(layout.terms)
    for path in layout.features.glob("*/.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for stage in (train, evaluate, score, select):
        stage.main(layout)
    after = {path.name: sha256_tree(path) for path in outputs}
    assert before == after, (before, after)
    return {}


STEPS: dict[str, Callable[[Path, argparse.Namespace], Figures]] = {
    "source": write_source,
    "rate": measure_rate,
    "ingest": take_in,
    "plant": plant,
    "first": run_tick,
    "close_seed": lambda folder, options: run_tick(folder, options, answer=True),
    "close": lambda folder, options: run_tick(folder, options, answer=True),
    "status": lambda folder, options: {},
    "idle": run_tick,
    "cold": rebuild,
}


# What is shown -------------------------------------------------------------------------------------------------------
def table(rows: Sequence[Figures]) -> str:
    """The steps of each size as lines."""
    lines = [f"{'items':>12} {'step':>12} {'s':>9} {'CPU s':>9} {'RSS MiB':>9} {'anon MiB':>9}"]
    for row in rows:
        for name, step in row["steps"].items():
            numbers = (step[key] for key in ("seconds", "cpu_seconds", "peak_rss_mib", "peak_anonymous_mib"))
            lines.append(f"{row['items']:>12,} {name:>12} " + " ".join(f"{number:>9,}" for number in numbers))
    return "\n".join(lines)


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function that it yields begins the next step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=-1)

        def tell(what: str) -> None:
            bar.update(task, advance=1, description=what)
            if not sys.stderr.isatty():
                print(what, file=sys.stderr, flush=True)  # noqa: T201

        yield tell


if __name__ == "__main__":
    main()
