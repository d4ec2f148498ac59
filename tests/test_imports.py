"""Who may import whom, read from the code itself; and what a start of `al` or of a stage really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IDEAS = {
    "acquisition", "clustering", "comparison", "cron", "gate", "labels", "lifecycle", "metrics", "pool",
    "query_strategies", "replay", "report", "running", "savings", "schema_change",
}  # fmt: skip
"""Know arrays and records: no files, no network, no process."""

WORDS = {"errors", "records"}

IDEAS_MAY = IDEAS | WORDS | {"charts"}

WORLD = {"pathlib", "os", "io", "subprocess", "socket", "shutil", "tempfile", "urllib", "http", "httpx", "requests"}

ONLY = {
    "torch": ("neural.",),
    "transformers": ("neural.",),
    "huggingface_hub": ("neural.",),
    "label_studio_sdk": ("label_studio",),
    "dvc": ("repository.",),
    "prefect": ("flows.",),
    "subprocess": ("repository.", "servers.", "child"),
    "httpx": ("label_studio", "servers.", "flows."),  # Prefect's client raises its errors
    "chardet": ("encodings",),
    "openpyxl": ("excel",),
    "typer": ("cli",),
    "matplotlib": ("charts",),
    "sklearn": (),
    "pandas": ("frames",),
    "requests": (),
    "pickle": (),
    "joblib": (),
}
"""Each outside system, and the only modules that know it."""

LAYERS = {
    "stages.": ("operations", "flows", "cli", "repository", "label_studio", "oracle", "servers", "workspace", "lock"),
    "operations.": ("flows", "cli", "stages", "neural", "head", "tfidf", "metrics", "acquisition", "query_strategies"),
    "repository": ("operations", "flows", "cli", "stages", "workspace", "label_studio", "oracle", "servers"),
    "servers": ("operations", "flows", "cli", "stages", "label_studio", "oracle", "repository"),
    "neural": ("operations", "flows", "cli", "stages", "repository", "label_studio", "workspace", "features"),
    "flows.": ("cli", "stages", "neural", "repository", "label_studio", "acquisition", "metrics", "head"),
    "label_studio": ("operations", "flows", "cli", "stages", "repository", "servers", "ledger"),
    "oracle": ("operations", "flows", "cli", "stages", "repository", "label_studio", "servers", "workspace"),
    "simulation": ("operations", "flows", "cli", "stages", "repository", "label_studio", "oracle", "servers", "lock"),
    "models": ("operations", "flows", "cli", "stages", "repository", "label_studio", "workspace", "neural"),
    "head": ("files", "layout", "params", "workspace", "neural"),
}
"""What each layer must not import."""

MATHS = {"numpy", "scipy"}
OPERATIONS_WITH_ARRAYS = {"operations.diff", "operations.publish", "operations.report"}
"""`diff` makes the random generator that `comparison` draws with."""

EXCEPTIONS = {
    ("operations.build", "neural.encoder"),
    ("operations.doctor", "neural.encoder"),  # the self-test of the machine
    ("operations.doctor", "neural.invariance"),
}
"""The weights are brought in by the module that knows them."""


@cache
def modules() -> dict[str, Path]:
    """Every module, by its name without `al_pipeline.`; a package by its own name."""
    found = {}
    for top in ("al_pipeline", "flows"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__").removeprefix("al_pipeline.")] = path
    return found


@cache
def imports(name: str, everywhere: bool = True) -> frozenset[str]:
    """What a module imports; with `everywhere`, inside functions and for type checkers too."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            base = str(node.module)
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix("al_pipeline.")
                found.add(whole if whole in modules() else base)
    return frozenset(name.removeprefix("al_pipeline.") for name in found)


def tops(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name)}


def belongs(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place if place.endswith(".") else f"{place}.") for place in places)


def ours(name: str) -> set[str]:
    return {imported for imported in imports(name) if imported in modules()}


def test_the_tables_name_modules_that_exist() -> None:
    named = IDEAS_MAY | OPERATIONS_WITH_ARRAYS | {name for pair in EXCEPTIONS for name in pair}
    assert named <= modules().keys()
    for place in {place for places in ONLY.values() for place in places} | LAYERS.keys():
        assert any(belongs(name, (place,)) for name in modules()), place


@pytest.mark.parametrize("name", sorted(IDEAS))
def test_ideas_know_no_files_and_no_network(name: str) -> None:
    assert not tops(name) & WORLD
    assert ours(name) <= IDEAS_MAY, f"{name} may not import {sorted(ours(name) - IDEAS_MAY)}"


@pytest.mark.parametrize("name", sorted(WORDS))
def test_words_import_nothing_of_ours(name: str) -> None:
    assert not ours(name)


@pytest.mark.parametrize("outside", sorted(ONLY))
def test_each_outside_system_is_known_in_one_place(outside: str) -> None:
    assert [name for name in modules() if outside in tops(name) and not belongs(name, ONLY[outside])] == []


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_layers_look_down_only(layer: str) -> None:
    for name in modules():
        if belongs(name, (layer,)):
            wrong = {other for other in ours(name) if belongs(other, LAYERS[layer]) and (name, other) not in EXCEPTIONS}
            assert not wrong, f"{name} may not import {sorted(wrong)}"


def test_stages_never_import_each_other() -> None:
    for name in modules():
        if name.startswith("stages."):
            assert not {other for other in ours(name) if other.startswith("stages.")}


def test_operations_know_no_maths() -> None:
    with_arrays = {name for name in modules() if name.startswith("operations.") and tops(name) & MATHS}
    assert with_arrays <= OPERATIONS_WITH_ARRAYS


def test_nobody_imports_the_command_line() -> None:
    assert [name for name in modules() if "cli" in ours(name)] == []


def test_modules_import_each_other_without_cycles() -> None:
    open_, done = set[str](), set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in open_, f"a cycle: {' -> '.join((*path, name))}"
        if name in done:
            return
        open_.add(name)
        for other in sorted(imports(name, everywhere=False) & modules().keys()):
            visit(other, (*path, name))
        open_.discard(name)
        done.add(name)

    for name in modules():
        visit(name, ())


def loaded(module: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after importing `module`."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = (line for line in result.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_al_starts_without_anything_heavy() -> None:
    heavy = {"torch", "transformers", "pandas", "numpy", "scipy", "sklearn", "pyarrow", "prefect", "dvc", "pydantic"}
    heavy |= {"label_studio_sdk", "httpx", "matplotlib", "jinja2", "psutil", "yaml"}
    found = loaded("al_pipeline.cli")
    assert "typer" in found, "the look itself works"
    assert not found & heavy


@pytest.mark.parametrize("stage", ["label", "train", "evaluate", "score", "select"])
def test_stages_start_without_torch(stage: str) -> None:
    found = loaded(f"al_pipeline.stages.{stage}")
    assert "pyarrow" in found or "yaml" in found, "the look itself works"
    assert not found & {"torch", "transformers", "pandas", "sklearn", "prefect", "dvc", "label_studio_sdk", "httpx"}
