"""`dvc.yaml` is the only place where the order of compute stands; these tests hold the code to it."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from al_pipeline.rounds.state_machine import BUILD, Step
from al_pipeline.workspace.layout import STAGES, Layout

ROOT = Path(__file__).parents[1]
WHOLE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
PIPELINE: dict[str, dict[str, Any]] = WHOLE["stages"]
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

OUTPUTS = {
    "label": {"labeled", "test_labels", "unresolved"},
    "train": {"model"},
    "evaluate": {"metrics", "metrics_csv", "confusion_csv", "predictions", "control"},
    "score": {"scores", "histogram", "guided"},
    "select": {"queries", "choice"},
}
"""What each stage writes, as attributes of Layout."""

FREE = {"features", "terms", "progress"}
"""Attributes of Layout that need no dependency: the caches of features, and the progress file."""


def outputs(stage: dict[str, Any]) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def source(stage: str) -> ast.Module:
    return ast.parse((ROOT / f"al_pipeline/stages/{stage}.py").read_text(encoding="utf-8"))


def layout_reads(stage: str) -> set[str]:
    """The attributes of `layout` that the stage's code names."""
    found: set[str] = set()
    for node in ast.walk(source(stage)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "layout":
            found.add(node.attr)
    return found


def params_reads(stage: str) -> set[str]:
    """The keys of `params.yaml`, one or two levels deep, that the stage names, or a function that gets all of them."""
    return set().union(*map(_reads_in, (source(stage), *given_all(source(stage)))))


def given_all(tree: ast.Module) -> Iterator[ast.AST]:
    """The imported functions that get `params` as a whole."""
    origin = {name.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in origin:
            continue
        if any(isinstance(one, ast.Name) and one.id == "params" for one in node.args):
            function = getattr(importlib.import_module(str(origin[node.func.id])), node.func.id)
            yield ast.parse(inspect.getsource(function))


def _reads_in(tree: ast.AST) -> set[str]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params":
            section, above = node.attr.rstrip("_"), parents[node]
            found.add(f"{section}.{above.attr}" if isinstance(above, ast.Attribute) else section)
    return found


def test_stages_are_those_of_the_layout_and_of_a_build() -> None:
    assert tuple(PIPELINE) == STAGES
    assert tuple(str(step) for step in BUILD) == (str(Step.ENCODER), str(Step.ENCODE), *STAGES)
    assert WHOLE.keys() == {"stages", "artifacts"}
    assert WHOLE["artifacts"]["classifier"]["path"] == Layout().model.as_posix()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_its_own_module_under_a_recorded_engine(name: str) -> None:
    stage = PIPELINE[name]
    assert stage["cmd"] == f"python -m al_pipeline.stages.{name}"
    assert "engine.json" in stage["deps"]
    assert stage["desc"] and set(stage) <= {"desc", "cmd", "deps", "params", "outs", "metrics", "plots"}
    assert "check_engine(layout.engine)" in ast.unparse(source(name))


@pytest.mark.parametrize("name", STAGES)
def test_the_parameters_exist_and_cover_what_the_code_reads(name: str) -> None:
    declared = set(PIPELINE[name]["params"])
    for key in declared:
        value: Any = PARAMS
        for part in key.split("."):
            assert part in value, f"{name}: {key} is not in params.yaml"
            value = value[part]
    reads = params_reads(name)
    assert reads, "the look itself works"
    missing = {key for key in reads if not {key, key.split(".")[0]} & declared}
    assert not missing, f"{name} reads {sorted(missing)}, which dvc.yaml does not declare: a change would pass unseen"
    unread = {key for key in declared if not any(f"{read}.".startswith(f"{key}.") for read in reads)}
    assert not unread, f"{name} declares {sorted(unread)}, which its code never reads: it would run again for nothing"


@pytest.mark.parametrize("name", STAGES)
def test_the_files_are_those_of_the_layout(name: str) -> None:
    layout = Layout()
    stage = PIPELINE[name]
    assert set(outputs(stage)) == {str(getattr(layout, attribute)) for attribute in OUTPUTS[name]}
    reads = layout_reads(name) - OUTPUTS[name] - FREE - {"params"}
    assert {str(getattr(layout, attribute)) for attribute in reads} == set(stage["deps"])


@pytest.mark.parametrize("section", ["schedule", "engine"])
def test_when_and_where_it_runs_is_no_stages_business(section: str) -> None:
    assert section in PARAMS
    declared = {key.split(".")[0] for stage in PIPELINE.values() for key in stage["params"]}
    assert section not in declared


def test_no_stage_depends_on_a_later_one() -> None:
    everything = [output for stage in PIPELINE.values() for output in outputs(stage)]
    assert len(everything) == len(set(everything)), "one file is made by one stage"
    made: set[str] = set()
    for name, stage in PIPELINE.items():
        ahead = (set(stage["deps"]) & set(everything)) - made
        assert not ahead, f"{name} needs {sorted(ahead)}, which is made later"
        made |= set(outputs(stage))


def test_what_no_stage_makes_is_a_source_or_the_engines() -> None:
    layout = Layout()
    made = {output for stage in PIPELINE.values() for output in outputs(stage)}
    needed = {dependency for stage in PIPELINE.values() for dependency in stage["deps"]} - made
    assert needed == {str(path) for path in (*layout.sources, layout.engine, layout.overrides, layout.asked_at_random)}


def test_the_test_set_reaches_evaluate_alone() -> None:
    for name, stage in PIPELINE.items():
        if name != "evaluate":
            assert not {"data/test", "data/test_labels.parquet"} & set(stage["deps"])
    assert not {"data/labeled.parquet", "data/pool"} & set(PIPELINE["evaluate"]["deps"])


def test_what_dvc_keeps_is_ignored_by_git_and_the_rest_is_not() -> None:
    kept, small = set[str](), set[str]()
    for stage in PIPELINE.values():
        for kind in ("outs", "metrics", "plots"):
            for entry in stage.get(kind, []):
                if isinstance(entry, str):
                    kept.add(f"/{entry}")
                else:
                    ((path, options),) = entry.items()
                    assert options["cache"] is False
                    small.add(f"/{path}")
    ignored = set(Layout().ignored)
    assert kept <= ignored
    assert not small & ignored


def test_what_git_tracks_of_the_results_is_what_a_publication_expects() -> None:
    """A file that a build writes and nobody expects would be taken for somebody's edit."""
    kept = {
        path
        for stage in PIPELINE.values()
        for kind in ("outs", "metrics", "plots")
        for entry in stage.get(kind, ())
        if isinstance(entry, dict)
        for path, settings in entry.items()
        if settings.get("cache") is False
    }
    assert kept == {path.as_posix() for path in Layout().results}
