"""The aims for teams and the quality of labels, with the figures that the benchmarks of its parts recorded.

    python -m benchmarks.quality

Reads results/annotators.json, consensus.json, relabel.json and label_errors.json; writes results/quality.json. Each
figure names the record and the commit that it is from. `met`: whether all its figures reach the aim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from al_pipeline.files import read_json
from benchmarks.record import RESULTS, record

Figures = Mapping[str, Any]


def main() -> None:
    """Write the record, and print which aims are met."""
    parts = (named_annotators, two_answers_and_the_model, relabelling, label_errors, adaptive_overlap, large_teams)
    found = {part.__name__: part() for part in parts}
    for name, aim in found.items():
        print(f"{'met' if aim['met'] else 'missed':7} {name}: {aim['aim']}")  # noqa: T201
    record("quality", found)


def named_annotators() -> dict[str, Any]:
    """Of teams with a random answerer, the share in which that person is named after 30 shared answers."""
    rows = [row for row in _figures("annotators")["random"] if row["answers"] == 30]
    return _aim(
        "a random answerer is named within 30 shared answers, and at most 1 % of honest people are",
        "annotators",
        {
            ", ".join(
                [
                    f"{row['classes']} classes",
                    f"{row['people']} people",
                    f"{row['overlap']} answers an item",
                    *([f"shares {row['shares']}"] if "shares" in row else []),
                ]
            ): {
                "named": row["named"],
                "honest_people_named": row["colleagues_named"],
                "possible": row["possible"],
            }
            for row in rows
        },
        all(row["named"] >= 0.95 and row["colleagues_named"] <= 0.01 for row in rows),
    )


def two_answers_and_the_model() -> dict[str, Any]:
    """Accuracy of the labels against the majority of three answers."""
    rows = _gains("consensus", ("crowdlab of 2 and the model", "dawid_skene of 2 and the model"))
    return _aim(
        "the consensus of two answers and the model is no worse than the majority of three",
        "consensus",
        rows,
        all(row["high"] >= 0 for row in rows.values()),
    )


def relabelling() -> dict[str, Any]:
    """Macro-F1 at equal numbers of answers against one answer for each item."""
    rows = {
        f"{corpus}, {noise}": dict(zip(("value", "low", "high"), arms["relabel"]["gain_end"], strict=True))
        for corpus, kinds in _figures("relabel")["corpora"].items()
        for noise, arms in kinds.items()
        if "gain_end" in arms.get("relabel", {})
    }
    noisy = [row for name, row in rows.items() if not name.endswith(" 0")]
    clean = [row for name, row in rows.items() if name.endswith(" 0")]
    return _aim(
        "with 20 or 30 % wrong answers relabelling gains by an interval above 0; without any it costs nothing",
        "relabel",
        rows,
        all(row["low"] > 0 for row in noisy) and all(row["high"] >= 0 for row in clean),
    )


def label_errors() -> dict[str, Any]:
    """Area under the precision-recall curve against cleanlab's on the same probabilities."""
    rows = {
        f"{corpus}, {kind}": row
        for corpus, kinds in _figures("label_errors")["corpora"].items()
        for kind, row in kinds.items()
    }
    return _aim(
        "planted label errors are ranked at least as well as by cleanlab's default",
        "label_errors",
        rows,
        all(row["ours"] >= row["cleanlab"] for row in rows.values()),
    )


def adaptive_overlap() -> dict[str, Any]:
    """Accuracy of the labels, and the share of three answers for each item that it takes."""
    rows = _gains("consensus", ("adaptive 0.9, with the model", "adaptive 0.95, with the model"))
    reached = {name.rpartition(": ")[0] for name, row in rows.items() if row["high"] >= 0 and row["answers"] <= 0.6 * 3}
    return _aim(
        "adaptive overlap reaches the accuracy of three answers for each item with at most 60 % of them",
        "consensus",
        rows,
        reached == {name.rpartition(": ")[0] for name in rows},
    )


def large_teams() -> dict[str, Any]:
    """Seconds of all quality figures of 100,000 answers by 20 people."""
    rows = {f"{row['classes']} classes": row for row in _figures("annotators")["hundred_thousand"]}
    return _aim(
        "quality figures of 100,000 answers in under 5 s",
        "annotators",
        rows,
        all(row["seconds"] < 5 for row in rows.values()),
    )


def _gains(name: str, arms: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {
        f"{corpus}: {arm}": {
            **dict(zip(("value", "low", "high"), found[arm]["gain"], strict=True)),
            "answers": found[arm]["answers"],
        }
        for corpus, found in _figures(name)["found"].items()
        for arm in arms
        if arm in found
    }


def _figures(name: str) -> Any:
    return read_json(RESULTS / f"{name}.json")["figures"]


def _aim(aim: str, name: str, figures: Figures, met: bool) -> dict[str, Any]:
    return {"aim": aim, "met": met, "from": name, "commit": read_json(RESULTS / f"{name}.json")["commit"], **figures}


if __name__ == "__main__":
    main()
