"""Decide about the new model, plan the next round, and publish: data first, then the commit, then the tag."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from al_pipeline.engine import current_engine
from al_pipeline.errors import ForeignEdit
from al_pipeline.files import read_json, read_object, sha256_file, sha256_tree, write_json, write_jsonl
from al_pipeline.gate import Decision, decide
from al_pipeline.items import count_items, fetch, read_ids
from al_pipeline.layout import Layout
from al_pipeline.ledger import read_refused
from al_pipeline.operations.history import History, Record, read_plans
from al_pipeline.params import Params
from al_pipeline.records import PlannedTask, push_key, round_name
from al_pipeline.repository import Dvc, Git
from al_pipeline.results import Predictions, parse_predictions, read_labeled, read_queries, read_unresolved
from al_pipeline.workspace import Workspace


def decide_and_plan(
    workspace: Workspace, git: Git, history: History, number: int | None, build: str, facts: Record
) -> None:
    """Write the record of round `number` (None: the first build's) and the plan of the round after it.

    `build` names the inputs that the build was made from; `facts` are what the tick knows of the round (times,
    answers, why it closed).
    """
    layout, params = workspace.layout, workspace.params
    upcoming = 0 if number is None else number + 1
    plan = _plan(workspace, git, upcoming)
    write_jsonl(layout.plan(upcoming), (asdict(task) for task in plan))
    record = {
        **facts,
        "round": number,
        "build": build,
        "parent": git.head(),
        "promoted_before": history.promoted,
        "counts": _counts(layout, plan),
        "hashes": _hashes(layout, upcoming),
        "params": params.model_dump(mode="json", by_alias=True),
        "engine": current_engine(),
        "metrics": read_json(layout.metrics),
    }
    if number is not None:
        record["decision"] = _decide(layout, git, history, params).to_row()
    write_json(layout.genesis if number is None else layout.record(number), record)


def publish(workspace: Workspace, git: Git, dvc: Dvc, number: int | None) -> str:
    """Push the data, prove that the remote has it, commit; returns the commit. Data before pointers."""
    layout = workspace.layout
    dvc.push()
    dvc.verify_remote()
    message = "Plan round-0000, before any label" if number is None else _message(read_json(layout.record(number)))
    return git.commit(message, [*layout.owned, layout.params, layout.dvc_yaml])


def tag(git: Git, layout: Layout, number: int) -> None:
    """Make the tag of round `number` at the commit that brought its record; harmless where it is there."""
    path = layout.record(number).relative_to(layout.root).as_posix()
    commit = git.run("log", "--format=%H", "--diff-filter=A", "--", path).stdout.split()[-1]
    text = git.show(commit, path)
    if text is None:
        raise ForeignEdit(f"{path} is not in the commit {commit[:12]} that should have brought it")
    git.tag(round_name(number), _message(read_json(layout.record(number))), commit)


def sync(git: Git, layout: Layout) -> None:
    """Push the branch and all rounds' tags to the git remote in one atomic step."""
    remote, branch = git.remote(), git.branch()
    if remote and branch:
        git.push(
            remote,
            [
                f"refs/heads/{branch}",
                *(f"refs/tags/{name}" for name in sorted(git.tags()) if name.startswith("round-")),
            ],
        )
        write_json(layout.private / "synced.json", {"head": git.head()})


def unsynced(git: Git, layout: Layout) -> bool:
    """Whether there is a git remote that was not given the present HEAD."""
    return git.remote() is not None and read_object(layout.private / "synced.json").get("head") != git.head()


def _plan(workspace: Workspace, git: Git, number: int) -> list[PlannedTask]:
    """Test items that nobody was asked about yet, then the batch."""
    layout = workspace.layout
    queries = read_queries(layout.queries)
    hashes = {
        item.item_id: item.content_hash for item in fetch([layout.pool], [query.item_id for query in queries]).values()
    }
    settled = {row.item_id for row in read_labeled(layout.test_labels)}
    settled |= {
        row.item_id for row in read_unresolved(layout.unresolved) if row.part == "test" and row.kind == "ignored"
    }
    earlier = {task.item_id for task in read_plans(git).values() if task.part == "test" and task.round < number}
    known = read_ids([layout.test])
    test = [
        (item, content)
        for item, content in zip(known.ids(), known.hashes(), strict=True)
        if item not in settled and item not in earlier
    ]

    def key(item_id: str) -> str:
        return push_key(workspace.id, number, item_id)

    tasks = [
        PlannedTask(key(item), item, content, "test", number, rank, 0.0, "test_set", 1.0)
        for rank, (item, content) in enumerate(sorted(test))
    ]
    return tasks + [
        PlannedTask(
            key(q.item_id),
            q.item_id,
            hashes[q.item_id],
            "pool",
            number,
            len(tasks) + q.rank,
            q.score,
            q.strategy,
            q.probability,
        )
        for q in queries
    ]


def _counts(layout: Layout, plan: list[PlannedTask]) -> dict[str, Any]:
    labeled, test_labels = read_labeled(layout.labeled), read_labeled(layout.test_labels)
    unresolved = read_unresolved(layout.unresolved)
    ignored = sum(row.part == "pool" and row.kind == "ignored" for row in unresolved)
    pending = sum(task.part == "pool" for task in plan)
    pool = count_items([layout.pool])
    return {
        "pool": pool,
        "labelled": len(labeled),
        "pending": pending,
        "ignored": ignored,
        "unlabelled": pool - len(labeled) - ignored - pending,
        "ties": sum(row.kind == "tie" for row in unresolved),
        "test": count_items([layout.test]),
        "test_labelled": len(test_labels),
        "labels": dict(sorted(Counter(row.label for row in labeled).items())),
        "test_labels": dict(sorted(Counter(row.label for row in test_labels).items())),
        "refused": len(read_refused(layout.events)),
    }


def _hashes(layout: Layout, upcoming: int) -> dict[str, str]:
    files = {
        "labeled": layout.labeled,
        "test_labels": layout.test_labels,
        "unresolved": layout.unresolved,
        "model": layout.model,
        "predictions": layout.predictions,
        "queries": layout.queries,
        "plan": layout.plan(upcoming),
        "params": layout.params,
    }
    return {name: sha256_tree(path) for name, path in files.items()} | {"dvc_lock": sha256_file(layout.dvc_lock)}


def _decide(layout: Layout, git: Git, history: History, params: Params) -> Decision:
    challenger = parse_predictions(layout.predictions.read_text(encoding="utf-8"))
    champion = None
    if history.promoted and (text := git.show(history.promoted, "rounds/predictions.csv")):
        champion = parse_predictions(text)
        if champion.classes != challenger.classes:
            champion = None
    before, after = _shared(champion, challenger) if champion else (None, challenger)
    truth = np.array([after.classes.index(label) for label in after.labels], dtype=np.intp)
    return decide(
        champion=None if before is None else before.proba,
        challenger=after.proba,
        truth=truth,
        classes=after.classes,
        limits=params.gate,
        rng=np.random.default_rng([params.seed, 0x6A7E]),
        bootstrap=params.evaluate.bootstrap,
        confidence=params.evaluate.confidence,
    )


def _shared(champion: Predictions, challenger: Predictions) -> tuple[Predictions, Predictions]:
    """Both models' rows for the test items that both saw, in the challenger's order; today's labels count."""
    rows = {item: row for row, item in enumerate(champion.item_ids)}
    keep = [row for row, item in enumerate(challenger.item_ids) if item in rows]
    items = tuple(challenger.item_ids[row] for row in keep)
    labels = tuple(challenger.labels[row] for row in keep)
    return (
        Predictions(items, labels, champion.classes, champion.proba[[rows[item] for item in items]]),
        Predictions(items, labels, challenger.classes, challenger.proba[keep]),
    )


def _message(record: Record) -> str:
    counts, decision = record["counts"], record["decision"]
    f1 = record["metrics"]["macro_f1"]["value"]
    score = "no test labels" if f1 is None else f"macro-F1 {f1:.3f}"
    return f"{round_name(record['round'])}: {counts['labelled']} labelled, {score}, {decision['verdict']}"
