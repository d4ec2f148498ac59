"""benchmarks/results/label_efficiency.json -> the table in README.md and docs/label-efficiency.png."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from al_pipeline.files import read_json, write_bytes, write_text
from al_pipeline.reporting.charts import CurvePoint, Panel, panels_png
from benchmarks.record import RESULTS, ROOT

NAMES = {
    "spamassassin2": "SpamAssassin, 31 % spam",
    "spamassassin2_10pct": "SpamAssassin, cut to 10 %",
    "spamassassin2_2pct": "SpamAssassin, cut to 2 %",
    "spamassassin2_1pct": "SpamAssassin, cut to 1 %",
    "bbc_news": "BBC News, 5 classes",
    "tweets_sentiment3": "tweets, 3 sentiments",
    "review_sentences2": "review sentences",
    "debian_sections": "Debian sections, 20 classes",
}
METRICS = {"average_precision": "AP", "macro_f1": "macro-F1"}
OURS = ("random", "margin", "auto")
SHARES = ("95", "98")
BEGIN, END = "<!-- benchmarks.label_efficiency writes from here -->", "<!-- to here -->"
PICTURE = ROOT / "docs/label-efficiency.png"


def publish(told: Mapping[str, Any]) -> None:
    """Put the table between its two marks in README.md, and draw the figure."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write_text(readme, f"{before}{BEGIN}\n\n{markdown(told)}\n\n{END}{after}")
    write_bytes(PICTURE, picture(told))


def markdown(told: Mapping[str, Any]) -> str:
    """A row for each corpus: labels for 95 / 98 % of the full score by strategy, and the gain of `auto` over random."""
    corpora = told["corpora"]
    arms = _in_order(told["means"])
    rows = [["corpus", "score", *map(_heading, arms), "auto over random"], ["---"] * (len(arms) + 3)]
    for name in NAMES:
        row = corpora[name]
        metric = row["metrics"][row["metric"]]
        gain, (low, high) = metric["gain"]["auto"], metric["gain_interval"]["auto"]
        cells = [" / ".join(_needed(row, arm, share) for share in SHARES) for arm in arms]
        rows.append([NAMES[name], METRICS[row["metric"]], *cells, f"{gain:+.3f} ± {(high - low) / 2:.3f}"])
    over = told["means"]["auto"] - told["means"]["random"]
    rows.append(["mean ALC", "", *(f"{told['means'][arm]:.3f}" for arm in arms), f"{over:+.3f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows).replace("| --- |", "|---|").replace(" --- |", "---|")


def _heading(arm: str) -> str:
    return f"{arm.removeprefix('their ')} (scikit-activeml)" if arm.startswith("their ") else arm


def _in_order(arms: Iterable[str]) -> list[str]:
    """Random first, then the peers', then ours."""
    return [OURS[0], *sorted(set(arms) - set(OURS)), *OURS[1:]]


def _needed(row: Mapping[str, Any], arm: str, share: str) -> str:
    found = row["metrics"][row["metric"]]["labels_needed"].get(arm)
    if arm == "random" and "to_the_end" in row:
        found = row["to_the_end"]["labels_needed"][arm]
    if found is None:
        found = row["peers"]["labels_needed"][arm]
    return "–" if found[share] is None else f"{found[share]:.0f}"


def picture(told: Mapping[str, Any]) -> bytes:
    """The learning curves: random, margin, `auto`, and the best of the others by its mean."""
    means = told["means"]
    others = [arm for arm in means if arm not in OURS]
    best = sorted(others, key=lambda arm: -means[arm])[:1]
    panels = {}
    for name in NAMES:
        row = told["corpora"][name]
        curves = row["metrics"][row["metric"]]["curves"] | {
            arm: row["peers"]["curves"][arm] for arm in best if "peers" in row
        }
        lines = {
            arm: [
                CurvePoint(labels, value, low, high)
                for labels, (value, low, high) in zip(row["budgets"], curves[arm], strict=True)
                if value is not None
            ]
            for arm in _in_order([*best, *OURS])
        }
        panels[NAMES[name]] = Panel(METRICS[row["metric"]], lines, row["metrics"][row["metric"]]["full"])
    return panels_png(panels)


def main() -> None:
    """Write table and figure from the existing record."""
    publish((read_json(RESULTS / "label_efficiency.json") or {})["figures"])


if __name__ == "__main__":
    main()
