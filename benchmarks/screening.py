"""Every query strategy, ours and scikit-activeml's, on two small corpora: which of theirs deserve the long benchmark.

    python -m benchmarks.screening --data FOLDER [--workers 2]

Writes benchmarks/results/screening.json: for each the area under its curve up to 400 labels, and which ones failed or
exceeded their processor time. FOLDER is that of benchmarks/label_efficiency.py; an interrupted run continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from al_pipeline.active_learning.choice import AUTO
from al_pipeline.active_learning.strategies import STRATEGIES
from benchmarks.label_efficiency import play
from benchmarks.peers import PEERS
from benchmarks.record import record

CORPORA = ("spamassassin2_10pct", "bbc_news")
"""One class that is rare, and five that are not; pools of 3,700 and 1,700."""
SEEDS = 3
BUDGET = 400
LIMIT = 20.0
"""Maximum seconds of processor time for a batch."""
BEST = 3


def main() -> None:
    """Run what is missing; write the ranking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    console = Console(stderr=True)
    ours = ("random", AUTO, *sorted(set(STRATEGIES) - {"random"}))
    found = {
        name: play(name, options.data, ours, PEERS, SEEDS, options.workers, console, BUDGET, LIMIT)["peers"]
        for name in CORPORA
    }
    ranked = ranking(found)
    shown = Table("strategy", *CORPORA, "mean area", title=f"area up to {BUDGET} labels, {SEEDS} seeds")
    for name, mean in ranked.items():
        shown.add_row(name, *(f"{found[corpus]['area'][name]:.3f}" for corpus in CORPORA), f"{mean:.3f}")
    console.print(shown)
    best = [name for name in ranked if name in PEERS][:BEST]
    console.print(f"The best of theirs: {', '.join(best)}")
    record("screening", {"budget": BUDGET, "limit": LIMIT, "corpora": found, "mean_area": ranked, "best_peers": best})


def ranking(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean area over the corpora, the best first, of strategies with a curve on all of them."""
    areas = [row["area"] for row in found.values()]
    names = [name for name in areas[0] if all(name in area for area in areas)]
    means = {name: float(np.mean([area[name] for area in areas])) for name in names}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


if __name__ == "__main__":
    sys.exit(main())
