"""No step of a tick is taken twice on equal facts, and none that has a reason to come again is stopped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Played, answer_all, copy_workspace, go_on, play
from msgspec.structs import replace

from al_pipeline.errors import ManualActionRequired, RepositoryError
from al_pipeline.integrations.git import Git
from al_pipeline.operations import build, publish
from al_pipeline.operations.steps import closing
from al_pipeline.operations.steps.context import TakenSteps
from al_pipeline.operations.tick import Options, tick
from al_pipeline.rounds.state_machine import Facts, Step
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import open_workspace

FACTS = Facts(items=80, incoming=0, planned=1, tasks=8)
BUILDING = replace(FACTS, closed=True, built=frozenset({Step.LABEL}))


@pytest.fixture
def layout(template: Any, tmp_path: Path) -> Layout:
    return copy_workspace(template, tmp_path).layout


@pytest.fixture
def taken(layout: Layout) -> TakenSteps:
    return TakenSteps(layout)


def test_a_step_on_equal_facts_is_stopped_and_the_sentence_says_what_they_are(taken: TakenSteps) -> None:
    taken.begin(Step.PUSH, FACTS)
    with pytest.raises(ManualActionRequired, match="the step `push` changed nothing .*planned 1, tasks 8"):
        taken.begin(Step.PUSH, FACTS)


@pytest.mark.parametrize("passed", [{"age_days": 0.5}, {"done": frozenset({Step.PUSH})}])
def test_time_and_the_step_itself_are_no_new_facts(taken: TakenSteps, passed: dict[str, Any]) -> None:
    taken.begin(Step.PUSH, FACTS)
    with pytest.raises(ManualActionRequired, match="`push`"):
        taken.begin(Step.PUSH, replace(FACTS, **passed))


@pytest.mark.parametrize(
    "change",
    [
        {"items": 81},
        {"incoming": 3},
        {"planned": 2},
        {"settled": 1},
        {"new_labels": 1},
        {"untagged": 1},
        {"closed": True},
        {"built": frozenset({Step.LABEL})},
        {"decided": True},
        {"unsynced": True},
        {"amend": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_step_on_other_facts_is_taken(taken: TakenSteps, change: dict[str, Any]) -> None:
    taken.begin(Step.PUSH, FACTS)
    taken.begin(Step.PUSH, replace(FACTS, **change))
    taken.begin(Step.PULL, FACTS)


def test_a_step_that_is_asked_for_again_is_taken_once_more(taken: TakenSteps) -> None:
    for step in (Step.PUSH, Step.SYNC):
        taken.begin(step, FACTS)
        taken.done.add(step)
    taken.again(Step.SYNC)
    assert taken.done == {Step.PUSH}
    taken.begin(Step.SYNC, FACTS)
    for step in (Step.PUSH, Step.SYNC):
        with pytest.raises(ManualActionRequired):
            taken.begin(step, FACTS)


def test_a_build_of_other_inputs_starts_over_and_one_of_the_same_does_not(layout: Layout, taken: TakenSteps) -> None:
    layout.engine.write_text("{}\n")
    taken.begin(Step.TRAIN, BUILDING)
    with pytest.raises(ManualActionRequired, match="`train`"):
        taken.begin(Step.TRAIN, BUILDING)
    before = build.build_key(layout)
    layout.params.write_text(layout.params.read_text() + "# edited\n")
    assert build.build_key(layout) != before
    taken.begin(Step.TRAIN, BUILDING)


# In a whole tick -----------------------------------------------------------------------------------------------------


def nothing(*_: Any, **__: Any) -> None:
    return None


def no_tag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish, "tag", nothing)


def no_record_of_stages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "record_built", nothing)


def no_decision(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(publish, "decide_and_plan", nothing)


def no_close(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(closing, "close", nothing)


BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (no_tag, "tag"),
    (no_record_of_stages, "encoder"),
    (no_decision, "decide"),
    (no_close, "close"),
]


@pytest.mark.parametrize(("breaks", "step"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_a_step_without_effect_ends_the_tick(
    started: Played,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[pytest.MonkeyPatch], None],
    step: str,
) -> None:
    """Whatever makes it so: then nobody waits for ever, the lock is free, and the next tick goes on."""
    workspace, oracle, truth = go_on(started, tmp_path)
    answer_all(oracle, truth)
    taken: list[str] = []

    def note(name: str, action: Callable[[], Any], /) -> Any:
        taken.append(name)
        assert len(taken) < 40, f"it goes on for ever: {taken}"
        return action()

    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises(ManualActionRequired, match=f"the step `{step}` changed nothing"):
            tick(open_workspace(workspace.layout.root), lambda: oracle, run=note)
    assert taken.count(step) == 1
    assert play(open_workspace(workspace.layout.root), oracle, truth, 1).published == (1,)
    assert {"round-0000", "round-0001"} <= set(Git(workspace.layout.root).tags())


# An object that git has lost -----------------------------------------------------------------------------------------


def test_a_lost_object_of_the_open_round_is_named_and_nothing_is_decided_on_it(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    answer_all(oracle, truth)
    layout, git = workspace.layout, Git(workspace.layout.root)
    head = git.head()
    names = ("rounds/0000/plan.jsonl", "rounds/0000", "rounds/genesis.json")
    for name, how in itertools.product(names, ("emptied", "lost")):
        digest = git.run("rev-parse", f"HEAD:{name}").stdout.strip()
        path = layout.root / ".git/objects" / digest[:2] / digest[2:]
        kept = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(b"") if how == "emptied" else path.unlink()
        for options in (Options(), Options(close_now=True)):
            with pytest.raises(RepositoryError, match=digest):
                tick(open_workspace(layout.root), lambda: oracle, options=options)
        assert git.run("rev-parse", "HEAD").stdout.strip() == head and git.tags() == {}, (name, how)
        assert not list(layout.inbox_events.glob("refused-*")), "no answer is refused on it"
        assert git.run("diff", "--cached", "--name-only", check=False).stdout == "", (name, how)
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
    report = tick(open_workspace(layout.root), lambda: oracle)
    assert report.published == (0,) and not report.refused and report.pulled == {"label": 22}
