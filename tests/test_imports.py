"""Who may import whom, read from the code itself; and what a start of `al` or of a stage really loads."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROUND = {
    "cron",
    "errors",
    "file_notes",
    "files",
    "logs",
    "params",
    "progress",
    "quantities",
    "records",
    "sanitize",
    "threads",
    "validation",
    "yaml_text",
}
"""Modules beside the folders: errors, records and parameters, atomic writes, the log. Any layer may import them."""

MAY_IMPORT = {
    # ideas: arrays and records
    "active_learning": (),
    "features": (),
    "models": ("active_learning", "features"),
    "evaluation": ("active_learning",),
    "annotation": (),
    "costs": (),
    "quality": ("annotation", "costs", "evaluation"),
    "stopping": (),
    "drift": ("evaluation", "features"),
    "rounds": ("annotation", "evaluation"),
    "notifications": ("annotation",),
    # the world
    "data": (),
    "workspace": (),
    "integrations": ("notifications", "workspace"),
    "servers": ("integrations", "workspace"),
    "plugins": ("active_learning", "models", "workspace"),
    "live": ("active_learning", "data", "features", "models", "rounds", "workspace"),
    "traffic": ("data", "workspace"),
    # what is done with both
    "reporting": ("evaluation", "quality", "rounds"),
    "simulation": (
        "active_learning", "annotation", "costs", "data", "evaluation", "features", "live", "models", "plugins",
        "reporting", "stopping", "workspace",
    ),
    "stages": (
        "active_learning", "annotation", "costs", "data", "evaluation", "features", "models", "plugins", "workspace",
    ),
    "operations": (
        "annotation", "costs", "data", "drift", "evaluation", "features", "integrations", "live", "models",
        "notifications", "plugins", "quality", "reporting", "rounds", "servers", "stopping", "traffic", "workspace",
    ),
    # callers
    "flows": ("evaluation", "integrations", "operations", "rounds", "servers", "workspace"),
    "serving": (
        "data", "drift", "evaluation", "features", "integrations", "models", "operations", "plugins", "traffic",
        "workspace",
    ),
    "frames": ("data", "evaluation", "integrations", "operations", "workspace"),
    "cli": (
        "data", "evaluation", "flows", "live", "notifications", "operations", "quality", "rounds", "servers", "serving",
        "simulation", "workspace",
    ),
}  # fmt: skip
"""The layers, lowest first: each folder, and the folders that it imports. An arrow that nothing needs fails too."""

IDEAS = {
    "active_learning", "annotation", "costs", "drift", "evaluation", "notifications", "quality", "rounds", "stopping",
}  # fmt: skip
"""Know no files, no network and no process; `features` and `models` read and save weights."""

OUTSIDE = {"pathlib", "os", "io", "subprocess", "socket", "shutil", "tempfile", "urllib", "http", "httpx", "requests"}

ONLY = {
    "torch": (
        "features",
        "models.training",
        "models.transformer",
        "serving.huggingface_export",
        "serving.huggingface_model",
    ),
    "transformers": (
        "features.encoder",
        "features.packing",
        "serving.huggingface_export",
        "serving.huggingface_model",
    ),
    "huggingface_hub": ("features.encoder",),
    "label_studio_sdk": ("integrations.label_studio.client",),
    "dvc": ("integrations.dvc",),
    "prefect": ("flows",),
    "prefect_dask": ("flows.encoding",),
    "prefect_ray": ("flows.encoding",),
    "dask": ("flows.encoding",),
    "distributed": ("flows.encoding", "integrations.dask_cluster"),
    "ray": ("flows.encoding",),
    "subprocess": ("integrations", "servers"),
    "httpx": ("integrations.label_studio", "servers", "flows"),  # Prefect's client raises its errors
    "apprise": ("integrations.apprise_process",),
    "fastapi": ("serving.app",),
    "starlette": ("serving.app",),
    "uvicorn": ("serving.server",),
    "prometheus_client": ("serving.metrics",),
    "onnx": ("serving.onnx_graph", "serving.onnx_head", "serving.onnx_export"),
    "onnxruntime": ("serving.onnx_encoder", "serving.exported"),
    "chardet": ("data.encodings",),
    "openpyxl": ("data.excel",),
    "typer": ("cli",),
    "matplotlib": ("reporting.charts",),
    "jinja2": ("reporting.html",),
    "pydantic": ("flows",),  # with which Prefect describes a run's parameters
    "sklearn": ("plugins.models",),
    "skops": (),  # imported by name, where plug-ins' models are stored
    "pandas": ("frames", "serving.exported"),  # MLflow hands tables over
    "requests": (),
    "pickle": (),
    "joblib": (),
}
"""Each outside library, and the only modules that know it."""

MATHS = {"numpy", "scipy"}
OPERATIONS_WITH_ARRAYS = {"operations.diff", "operations.publish", "operations.report"}
"""`diff` makes the random generator that `comparison` draws with."""


@cache
def modules() -> dict[str, Path]:
    """Every module, by its name without `al_pipeline.`; a package by its own name."""
    found = {}
    for path in sorted((ROOT / "al_pipeline").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__").removeprefix("al_pipeline.")] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports, inside functions and for type checkers too."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
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
    """The top-level packages that a module imports, none of ours among them."""
    return {imported.split(".")[0] for imported in imports(name) if imported not in modules()}


def belongs(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def ours(name: str) -> set[str]:
    return {imported for imported in imports(name) if imported in modules()}


def folder(name: str) -> str:
    return name.split(".")[0]


def test_the_tables_name_modules_that_exist() -> None:
    assert modules().keys() >= OPERATIONS_WITH_ARRAYS
    for place in {place for places in ONLY.values() for place in places}:
        assert any(belongs(name, (place,)) for name in modules()), place


def test_every_module_lies_in_a_layer() -> None:
    assert {folder(name) for name in modules()} - {"al_pipeline"} == GROUND | MAY_IMPORT.keys()


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_what_the_table_says(layer: str) -> None:
    found: dict[str, set[str]] = {}
    for name in modules():
        if folder(name) == layer:
            for other in ours(name):
                found.setdefault(folder(other), set()).add(f"{name} -> {other}")
    used = found.keys() - GROUND - {layer, "al_pipeline"}
    upward = {arrow for other in used - set(MAY_IMPORT[layer]) for arrow in found[other]}
    assert not upward, f"not allowed: {sorted(upward)}"
    assert used == set(MAY_IMPORT[layer]), f"{layer} has no need of {sorted(set(MAY_IMPORT[layer]) - used)}"


def test_the_table_is_in_order() -> None:
    order = list(MAY_IMPORT)
    assert all(order.index(other) < order.index(layer) for layer, others in MAY_IMPORT.items() for other in others)


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_imports_ground_alone(name: str) -> None:
    assert ours(name) <= GROUND


@pytest.mark.parametrize("layer", sorted(IDEAS))
def test_ideas_know_no_files_and_no_network(layer: str) -> None:
    for name in modules():
        if folder(name) == layer:
            assert not {imported.split(".")[0] for imported in imports(name)} & OUTSIDE, name
            assert not {"files"} & ours(name), name


@pytest.mark.parametrize("outside", sorted(ONLY))
def test_each_outside_library_is_known_in_one_place(outside: str) -> None:
    assert [name for name in modules() if outside in tops(name) and not belongs(name, ONLY[outside])] == []


def test_stages_never_import_each_other() -> None:
    for name in modules():
        if name.startswith("stages."):
            assert not {other for other in ours(name) if other.startswith("stages.")}


def test_operations_know_no_maths() -> None:
    with_arrays = {name for name in modules() if name.startswith("operations.") and tops(name) & MATHS}
    assert with_arrays <= OPERATIONS_WITH_ARRAYS


def test_nobody_imports_the_command_line() -> None:
    assert [name for name in modules() if folder(name) != "cli" and "cli" in map(folder, ours(name))] == []


def test_the_folder_at_the_top_shows_the_flows_that_the_package_carries() -> None:
    for name in ("rounds", "deployments"):
        shown, carried = importlib.import_module(f"flows.{name}"), importlib.import_module(f"al_pipeline.flows.{name}")
        assert all(getattr(shown, what) is getattr(carried, what) for what in shown.__all__)


def test_modules_import_each_other_without_cycles() -> None:
    open_, done = set[str](), set[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in open_, f"a cycle: {' -> '.join((*path, name))}"
        if name in done:
            return
        open_.add(name)
        for other in sorted(ours(name)):
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
    heavy |= {"label_studio_sdk", "httpx", "matplotlib", "jinja2", "msgspec", "psutil", "yaml"}
    found = loaded("al_pipeline.cli.app")
    assert "typer" in found, "the look itself works"
    assert not found & heavy


def modules_after(code: str) -> set[str]:
    """All modules that a fresh interpreter, outside a terminal, has loaded after `code`."""
    like_a_terminal = {"COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, sep='\\n', file=sys.stderr)"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in like_a_terminal},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stderr.split())


HEAVY = frozenset(
    {"httpx", "importlib.metadata", "label_studio_sdk", "numpy", "prefect", "psutil", "pyarrow", "pydantic", "rich"}
)
"""What short commands load only where they have a use for it."""
NETWORK = frozenset({"email", "http.client", "ssl", "urllib.request"})


def test_status_loads_nothing_of_a_tick() -> None:
    found = modules_after("import al_pipeline.operations.status, al_pipeline.integrations.label_studio.probe")
    ours = {"operations.tick", "operations.publish", "integrations.dvc.session", "workspace.fingerprint"}
    assert "al_pipeline.operations.facts" in found, "the look itself works"
    assert not found & {*(f"al_pipeline.{name}" for name in ours), "al_pipeline.servers", *HEAVY, *NETWORK}


def test_a_tick_loads_what_it_finds_a_use_for() -> None:
    found = modules_after("import al_pipeline.operations.tick, al_pipeline.operations.sources")
    assert "al_pipeline.operations.push" in found, "the look itself works"
    ours = {"operations.ingest", "operations.guess", "servers"}
    assert not found & {*(f"al_pipeline.{name}" for name in ours), "statistics", *HEAVY}


def test_an_intervention_loads_no_client() -> None:
    found = modules_after("import al_pipeline.operations.intervene, al_pipeline.integrations.label_studio.probe")
    assert "al_pipeline.integrations.dvc.session" in found, "the look itself works"
    assert not found & HEAVY


def test_texts_and_paths_of_a_command_line_load_no_pydantic() -> None:
    words = ["al", "-C", "nowhere", "pause", "--reason", "a test"]
    start = f"sys.argv = {words}\ntry: app.main()\nexcept SystemExit: pass"
    found = modules_after(f"import sys\nfrom al_pipeline.cli import app\n{start}")
    assert "al_pipeline.cli.values" in found, "the look itself works"
    assert "pydantic" not in found


def test_output_that_no_terminal_shows_loads_no_rich() -> None:
    lines = "o.echo('[bold]1[/]'); o.print_table(('a', 'b'), [['1', o.escape('2')]])"
    found = modules_after(f"from al_pipeline.cli import output as o; {lines}")
    assert "al_pipeline.cli.output" in found, "the look itself works"
    assert "rich" not in found


@pytest.mark.parametrize("stage", ["label", "train", "evaluate", "score", "select"])
def test_stages_start_without_torch(stage: str) -> None:
    found = loaded(f"al_pipeline.stages.{stage}")
    assert "pyarrow" in found or "yaml" in found, "the look itself works"
    assert not found & {"torch", "transformers", "pandas", "sklearn", "prefect", "dvc", "pydantic"}
    assert not found & {"label_studio_sdk", "httpx"}


def test_contributing_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("## The package") : text.index("## Development commands")]
    single = {"cli", "flows", "operations", "reporting", "servers", "simulation", "stages"}
    for name, path in modules().items():
        known = f"{folder(name)}/" if folder(name) in single or path.name == "__init__.py" else path.name
        if name != "al_pipeline" and not name.startswith("integrations.dvc."):
            assert known in tree, name
