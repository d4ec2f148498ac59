"""The laws of a plan: what a round asks, of which part, each thing once, and what it keeps of the round before."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from al_pipeline.data.ledger import append_part
from al_pipeline.data.outputs import write_labeled, write_queries, write_unresolved
from al_pipeline.data.pool import write_items
from al_pipeline.files import write_json
from al_pipeline.integrations.git.objects import Tree
from al_pipeline.operations.planning import plan_tasks
from al_pipeline.records import (
    Event,
    Item,
    LabeledItem,
    LabelIntervention,
    PlannedTask,
    Query,
    Selection,
    Unresolved,
    content_hash,
    push_key,
)
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import Workspace

WORKSPACE = "0123456789ab"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Nobody looks at these files after a power loss, and fsync is slow."""
POOL = [f"pool:{number}" for number in range(12)]
TEST = [f"test:{number}" for number in range(12)]


class Committed:
    """The plans that git has, in place of a repository."""

    root = Path(os.devnull)  # no cache of plans can be written there

    def __init__(self, plans: dict[int, Sequence[PlannedTask]]) -> None:
        self.texts = {
            f"rounds/{number:04d}/plan.jsonl": "".join(json.dumps(asdict(task)) + "\n" for task in plan)
            for number, plan in plans.items()
        }

    def tree(self, revision: str, folder: str) -> Tree:
        return {name: ("100644", "blob", content_hash(text)) for name, text in self.texts.items()}

    def read(self, revision: str, names: Sequence[str], tree: Tree) -> dict[str, str]:
        return {name: self.texts[name] for name in names}

    def show(self, revision: str, name: str) -> str | None:
        return self.texts.get(name)


def asked(item: str, number: int, rank: int = 0) -> PlannedTask:
    part = "test" if item.startswith("test") else "pool"
    key = push_key(WORKSPACE, number, item)
    return PlannedTask(key, item, content_hash(item), part, number, rank, 0.5, "margin", 1.0, None, None)  # type: ignore[arg-type]


def _answer(item: str) -> Event:
    task = asked(item, 1)
    return Event(f"said {item}", "label", item, task.content_hash, task.part, 1, f"{task.push_key}#p.1", "ann", "ham")


@dataclass
class Situation:
    """What a plan is made from. The round before it asked `open_`, of which `kept` stays."""

    labelled: set[str]
    ignored: set[str]
    older: list[str]
    open_: list[str]
    kept: set[str]
    chosen: list[str]
    abandoned: set[int]
    void: set[str]
    """Items of the older round with an answer that is revoked."""
    share: int


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    some = lambda of: st.sets(st.sampled_from(of)) if of else st.just(set())  # noqa: E731
    older = sorted(draw(some([*POOL, *TEST])))
    labelled = draw(some([*POOL, *TEST]))
    ignored = draw(some([*POOL, *TEST])) - labelled
    open_ = draw(st.permutations(sorted(draw(some([*POOL, *TEST])))))
    kept = draw(some(sorted(set(open_) - labelled - ignored)))
    free = [item for item in POOL if item not in labelled | ignored | kept]
    chosen = draw(st.permutations(free))[: draw(st.integers(0, len(free)))]
    void = draw(some(older)) if older else set()
    return Situation(
        labelled, ignored, older, list(open_), kept, chosen, draw(st.sets(st.sampled_from([1, 2]))), void,
        draw(st.integers(0, 14)),
    )  # fmt: skip


def plan_of(folder: Path, found: Situation, *, committed: bool = False) -> tuple[list[PlannedTask], list[PlannedTask]]:
    """The plan of round 3, and that of round 2. `committed`: as where it is derived again from what was published."""
    layout = Layout(folder)
    for path in (layout.pool, layout.test, layout.events, layout.rounds):
        path.mkdir(parents=True, exist_ok=True)
    layout.params.write_text(template("params.yaml").replace("  test_tasks: 40", f"  test_tasks: {found.share}"))
    for folder_, ids in ((layout.pool, POOL), (layout.test, TEST)):
        write_items(folder_ / "part-000001.parquet", [[Item(item, content_hash(item), item) for item in ids]])
    write_queries(layout.queries, [Query(item, rank, 0.5, "margin", 1.0) for rank, item in enumerate(found.chosen)])
    write_labeled(layout.labeled, [LabeledItem(i, content_hash(i), "ham", 1.0, 1, 1) for i in sorted(found.labelled)])
    tested = [i for i in sorted(found.labelled) if i in TEST]
    write_labeled(layout.test_labels, [LabeledItem(item, content_hash(item), "ham", 1.0, 1, 1) for item in tested])
    parts = [(item, "test" if item in TEST else "pool") for item in sorted(found.ignored)]
    write_unresolved(layout.unresolved, [Unresolved(item, part, "ignored", "", 1) for item, part in parts])  # type: ignore[arg-type]
    events = [_answer(item) for item in sorted(found.void)]
    revoked = LabelIntervention("revoke", selection=Selection(round=1))
    events.append(Event("r", "quarantine", "", "", "pool", 2, "intervention:1", "admin", intervention=revoked))
    append_part(layout.events, events)
    stays = [item for item in found.open_ if item in found.kept]
    write_json(
        layout.overrides,
        {"round": 3, "kept": [i for i in stays if i in POOL], "kept_test": [i for i in stays if i in TEST]},
    )
    before = [asked(item, 2, rank) for rank, item in enumerate(found.open_)]
    plans: dict[int, Sequence[PlannedTask]] = {1: [asked(item, 1) for item in found.older], 2: before}
    workspace = Workspace(layout, WORKSPACE)
    made = plan_tasks(workspace, Committed(plans), 3, found.abandoned)  # type: ignore[arg-type]
    if committed:
        again = plan_tasks(workspace, Committed({**plans, 3: made}), 3, found.abandoned)  # type: ignore[arg-type]
        assert again == made, "derived again from the tree that holds it"
    return made, before


@settings(max_examples=40)
@given(situations())
def test_a_plan_asks_each_thing_once_and_of_the_right_part(found: Situation) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        plan, before = plan_of(Path(name), found, committed=True)
    items = [task.item_id for task in plan]
    assert len(set(items)) == len(items) and len({task.push_key for task in plan}) == len(plan)
    assert [task.rank for task in plan] == list(range(len(plan))) and {task.round for task in plan} <= {3}
    assert all(task.part == ("test" if task.item_id in TEST else "pool") for task in plan)
    assert all(task.content_hash == content_hash(task.item_id) for task in plan)

    kept = [task for task in before if task.item_id in found.kept]
    own = plan[len(kept) :]
    assert [replace(task, round=2, rank=0) for task in plan[: len(kept)]] == [replace(task, rank=0) for task in kept]
    assert [task.push_key for task in own] == [push_key(WORKSPACE, 3, task.item_id) for task in own]

    pool = [task.item_id for task in own if task.part == "pool"]
    assert pool == found.chosen, "the queries, all of them and in their order"

    test = [task.item_id for task in own if task.part == "test"]
    heard = {item for item in found.older if 1 not in found.abandoned and item not in found.void}
    heard |= {item for item in found.open_ if 2 not in found.abandoned}
    spare = set(TEST) - found.labelled - found.ignored - found.kept - heard
    assert set(test) <= spare, "nobody was asked about it yet, and nobody has labelled it or skipped it for good"
    room = max(0, found.share - sum(item in TEST for item in found.kept))
    assert len(test) == min(room, len(spare)), "as many as the round wants, where there are as many"

    for end in range(len(own) + 1):
        share = sum(task.part == "test" for task in own[:end])
        assert abs(share - end * len(test) / max(1, len(own))) <= 1, "spread over the whole round"


@settings(max_examples=10)
@given(situations(), st.integers(0, 14))
def test_a_smaller_share_of_test_tasks_is_the_beginning_of_a_larger_one(found: Situation, other: int) -> None:
    """The test set is asked in one random order, so that what is labelled of it is a random sample at any time."""
    rows = []
    for share in sorted((found.share, other)):
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            plan, _ = plan_of(Path(name), dataclasses.replace(found, share=share))
        rows.append([task.item_id for task in plan if task.part == "test" and task.item_id not in found.kept])
    few, many = rows
    assert many[: len(few)] == few
