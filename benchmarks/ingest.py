"""What ingesting a file costs, beside parsing it by pyarrow.

    python -m benchmarks.ingest [--rows 400000]      writes benchmarks/results/ingest.json

The rows have an id, a text of 8 to 30 words, and two other columns; the same rows are a CSV, a JSONL and a Parquet
file. Seconds are processor time of all threads, after the imports: reading, checking, hashing, looking for duplicates,
drawing the test set, writing the parts. pyarrow parses the file in blocks and does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from al_pipeline.operations.ingest import ingest
from al_pipeline.workspace.workspace import open_workspace
from benchmarks.record import ROOT, record

FORMATS = ("csv", "jsonl", "parquet")
SIZE = 1 << 20
REPEATS = 3
MARKER = '{"layout": 3, "workspace_id": "0123456789ab"}'


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), options.rows)
        found = {path.suffix[1:]: measure(path, options.rows, Path(folder)) for path in files}
    print(json.dumps(found, indent=2))  # noqa: T201
    record("ingest", {"rows": options.rows, "repeats": REPEATS, "formats": found})


def write_files(folder: Path, rows: int) -> list[Path]:
    """The same rows in each format."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    words[:50] = [f"{word}é" for word in words[:50]]
    table: list[dict[str, Any]] = [
        {
            "id": f"m-{number:07d}",
            "text": " ".join(rng.choices(words, k=rng.randint(8, 30))),
            "source": rng.choice(["web", "mail", "app"]),
            "stars": rng.randint(1, 5),
        }
        for number in range(rows)
    ]
    files = [folder / f"rows.{name}" for name in FORMATS]
    with files[0].open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    with files[1].open("w", encoding="utf-8", newline="") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    pa.parquet.write_table(pa.Table.from_pylist(table), files[2])
    return files


def measure(path: Path, rows: int, folder: Path) -> dict[str, float]:
    """Processor seconds of an ingest and of pyarrow's parser: the least of some runs, in turns."""
    ours, theirs = [], []
    for _ in range(REPEATS):
        theirs.append(cpu_seconds(partial(parse, path)))
        with tempfile.TemporaryDirectory(dir=folder) as root:
            ours.append(cpu_seconds(partial(take_in, Path(root), path, rows)))
    return {
        "cpu_seconds": round(min(ours), 2),
        "rows_per_cpu_second": round(rows / min(ours)),
        "pyarrow_parse_cpu_seconds": round(min(theirs), 2),
    }


def take_in(root: Path, path: Path, rows: int) -> None:
    """A first ingest into an empty workspace."""
    (root / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (root / "al-workspace.json").write_text(MARKER, encoding="utf-8")
    report = ingest(open_workspace(root), [path])
    assert report.rows == rows == report.added + report.test_added + report.duplicates


def parse(path: Path) -> int:
    """The rows of a file by pyarrow, in blocks of a mebibyte."""
    batches: Iterable[Any]
    if path.suffix == ".parquet":
        batches = pa.parquet.ParquetFile(path).iter_batches(batch_size=8192)
    elif path.suffix == ".csv":
        batches = pa.csv.open_csv(path, pa.csv.ReadOptions(use_threads=False, block_size=SIZE))
    else:
        batches = pa.json.open_json(path, pa.json.ReadOptions(use_threads=False, block_size=SIZE))
    return sum(len(batch) for batch in batches)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
