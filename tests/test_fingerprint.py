"""The engine's fingerprint: it covers what stages run, and says what differs."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_imports import modules, ours

import al_pipeline
from al_pipeline.errors import EngineChanged
from al_pipeline.files import read_json, write_json
from al_pipeline.workspace import code_digest
from al_pipeline.workspace import fingerprint as engine
from al_pipeline.workspace.code_digest import module_digest, package_digest
from al_pipeline.workspace.fingerprint import (
    MODULES,
    NO_OUTPUT,
    _engine,
    check_engine,
    current_engine,
    difference,
    write_engine,
)
from al_pipeline.workspace.layout import STAGES


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _engine.cache_clear()
    yield
    _engine.cache_clear()


def closure(starts: list[str]) -> set[str]:
    """Every module of ours that `starts` import, and the packages that lie above them."""
    found: set[str] = set()
    queue = list(starts)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        queue += ours(name)
        parents = name.split(".")[:-1]
        queue += [".".join(parents[: depth + 1]) for depth in range(len(parents))]
    return found


def test_the_fingerprint_covers_exactly_what_stages_import() -> None:
    package = Path(al_pipeline.__file__).parent
    names = closure([f"stages.{stage}" for stage in STAGES]) | {"al_pipeline"}
    imported = sorted(modules()[name].relative_to(package).as_posix() for name in names)
    assert sorted([*MODULES, *NO_OUTPUT]) == imported


def trees(names: Sequence[str] = MODULES) -> Iterator[tuple[str, ast.Module]]:
    for name in names:
        yield name, ast.parse((Path(al_pipeline.__file__).parent / name).read_text(encoding="utf-8"))


def test_no_stage_reads_when_and_where_it_runs_and_parameters_only_check_it() -> None:
    for name, tree in trees():
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert name == "params.py" or "al_pipeline.cron" not in found
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "schedule" not in read and "runner" not in read, name
    from al_pipeline.cron import check_cron, check_timezone

    assert (check_cron("5 4 * * *"), check_timezone("Europe/Berlin")) == ("5 4 * * *", "Europe/Berlin")


def test_what_is_said_of_progress_gives_nothing_back() -> None:
    """Each call of a progress callback is a statement of its own, so that no result depends on it."""
    calls = 0
    for name, tree in trees():
        statements = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"progress", "on_progress"}:
                assert node in statements, f"{name}:{node.lineno}"
                calls += 1
    assert calls, "the names are those that the modules use"


def test_no_module_uses_the_private_names_of_another() -> None:
    """So that a private function which only composes messages is known by its own module."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("al_pipeline"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], name


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's sources, as the package that the fingerprint reads."""
    target = tmp_path / "al_pipeline"
    shutil.copytree(Path(al_pipeline.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(al_pipeline, "__file__", str(target / "__init__.py"))
    return target


@pytest.mark.parametrize("module", MODULES)
def test_a_statement_more_in_a_module_changes_the_digest(module: str) -> None:
    """And a comment more, another docstring and other line breaks do not."""
    source = (Path(al_pipeline.__file__).parent / module).read_text(encoding="utf-8")
    before = module_digest(source)
    assert module_digest(f"{source}\nadded = 1\n") != before
    assert module_digest(f'"""Reworded."""\n\n\n{source}# a comment\n') == before
    assert module_digest(ast.unparse(ast.parse(source))) == before


SOURCE = '''
"""A module."""
from __future__ import annotations
import numpy as np
from al_pipeline.errors import BadInput

_ROUNDS = 100
_HINT = "look there"

def score(proba: np.ndarray, slope: float = 0.5, *, keep: bool = True) -> np.ndarray:
    """Margins."""
    if proba.ndim != 2:
        raise BadInput(f"proba has {proba.ndim} dimensions, not 2; {_hint(proba)}")
    low: float = proba.min()
    proba = proba - low
    proba = proba * slope
    assert keep, "keep it"
    _log.info("scored %d rows", len(proba))
    for _ in range(_ROUNDS):
        proba = np.sqrt(proba)
    return 1.0 - proba

class Settings:
    epochs: int = 6
    """How often."""
    kind = "mean"

def refuse(path):
    return ValueError("no " + "such file: " + str(path))

def _hint(proba):
    return _HINT if len(proba) else "nothing there"
'''

COMPUTES_ANOTHER = {
    "formula": ("1.0 - proba", "1.0 + proba"),
    "constant": ("_ROUNDS = 100", "_ROUNDS = 101"),
    "type of a constant": ("return 1.0 -", "return 1 -"),
    "default": ("slope: float = 0.5", "slope: float = 0.25"),
    "default of a keyword": ("keep: bool = True", "keep: bool = False"),
    "default of a class": ("epochs: int = 6", "epochs: int = 7"),
    "type that a class declares": ("epochs: int = 6", "epochs: float = 6"),
    "order": (
        "    proba = proba - low\n    proba = proba * slope\n",
        "    proba = proba * slope\n    proba = proba - low\n",
    ),
    "indentation": ("    return 1.0", "        return 1.0"),
    "statement less": ("    proba = proba * slope\n", ""),
    "text that is no message": ('kind = "mean"', 'kind = "sum"'),
    "condition of an error": ("proba.ndim != 2", "proba.ndim != 3"),
    "kind of an error": ("raise BadInput(", "raise TypeError("),
    "condition of an assertion": ("assert keep", "assert not keep"),
    "a logger's name for something else": ("low: float = proba", "_log = 0.5 * proba"),
    "import": ("import numpy as np", "import numpy.ma as np"),
    "decorator": ("def score(", "@cache\ndef score("),
}
COMPUTES_THE_SAME = {
    "docstring of a module": ('"""A module."""', '"""Another."""'),
    "docstring of a function": ('    """Margins."""\n', '    """Margins.\n\n    Of rows.\n    """\n'),
    "no docstring": ('    """Margins."""\n', ""),
    "docstring of an attribute": ('"""How often."""', '"""How many times."""'),
    "comment": ("    low:", "    # the least\n    low:"),
    "line break": ("proba = proba * slope", "proba = (\n        proba\n        * slope\n    )"),
    "blank line": ("class Settings", "\n\nclass Settings"),
    "quotes": ('kind = "mean"', "kind = 'mean'"),
    "message": (" dimensions, not 2", " axes where two are wanted"),
    "values in a message": ("{proba.ndim} dimensions, ", ""),
    "message without values": ('f"proba has {proba.ndim} dimensions, not 2; {_hint(proba)}"', '"bad proba"'),
    "message composed elsewhere": ("look there", "look elsewhere"),
    "function that only composes messages": ('else "nothing there"', 'else "nothing at all" * 2'),
    "message of an error that is returned": ("such file: ", "such folder: "),
    "message of an assertion": (', "keep it"', ""),
    "log": ('_log.info("scored %d rows", len(proba))', '_log.debug("scored")'),
    "a logger": ("_ROUNDS =", "from al_pipeline.logs import get_logger\n_log = get_logger(__name__)\n_ROUNDS ="),
    "annotation of an argument": ("proba: np.ndarray,", "proba,"),
    "annotation of a result": (") -> np.ndarray:", ") -> NDArray:"),
    "annotation of a variable": ("low: float =", "low ="),
    "import of a type": ("import numpy as np", "import numpy as np\nfrom collections.abc import Sequence"),
}


@pytest.mark.parametrize("change", COMPUTES_ANOTHER)
def test_what_computes_something_else_changes_the_digest(change: str) -> None:
    old, new = COMPUTES_ANOTHER[change]
    assert SOURCE.count(old) == 1
    assert module_digest(SOURCE.replace(old, new)) != module_digest(SOURCE)


@pytest.mark.parametrize("change", COMPUTES_THE_SAME)
def test_other_words_and_another_layout_do_not(change: str) -> None:
    old, new = COMPUTES_THE_SAME[change]
    assert SOURCE.count(old) == 1
    assert module_digest(SOURCE.replace(old, new)) == module_digest(SOURCE)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("active_learning/acquisition.py", "1.0", "0.999"),
        ("params.py", "ge=1, le=100)] = 6", "ge=1, le=100)] = 7"),
        ("models/probabilities.py", "axis=1, keepdims=True)), np.float64)", "axis=1, keepdims=True)), np.float32)"),
    ],
)
def test_a_change_of_the_real_modules_is_seen(copied: Path, module: str, old: str, new: str) -> None:
    before = current_engine()["sources"]
    source = (copied / module).read_text(encoding="utf-8")
    assert old in source
    (copied / module).write_text(source.replace(old, new, 1), encoding="utf-8")
    _engine.cache_clear()
    assert current_engine()["sources"] != before


@pytest.mark.parametrize("module", MODULES)
def test_no_message_of_the_real_modules_counts(module: str) -> None:
    """Each text of a `raise`, reworded."""

    class Reword(ast.NodeTransformer):
        def visit_Raise(self, node: ast.Raise) -> ast.AST:
            if isinstance(node.exc, ast.Call):
                node.exc.args = [
                    ast.Constant("reworded")
                    if isinstance(each, ast.JoinedStr)
                    or (isinstance(each, ast.Constant) and isinstance(each.value, str))
                    else each
                    for each in node.exc.args
                ]
            return node

    source = (Path(al_pipeline.__file__).parent / module).read_text(encoding="utf-8")
    assert module_digest(ast.unparse(Reword().visit(ast.parse(source)))) == module_digest(source)


def test_the_digest_is_kept_by_the_bytes_of_the_modules(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path / "home"))
    first = package_digest(copied, MODULES)
    kept = tmp_path / "home" / code_digest._CACHE
    assert kept.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as patch:
        patch.setattr(code_digest, "module_digest", lambda source: pytest.fail("parsed again"))
        assert package_digest(copied, MODULES) == first
    path = copied / "evaluation/metrics.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    second = package_digest(copied, MODULES)
    assert second != first
    assert sorted(read_json(kept).values()) == sorted([first, second])


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"x": 1}', "\x00"])
def test_a_damaged_cache_of_digests_is_made_again(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path / "home"))
    first = package_digest(copied, MODULES[:3])
    (tmp_path / "home" / code_digest._CACHE).write_text(damage, encoding="utf-8")
    assert package_digest(copied, MODULES[:3]) == first
    with monkeypatch.context() as patch:
        patch.setattr(code_digest, "module_digest", lambda source: pytest.fail("parsed again"))
        assert package_digest(copied, MODULES[:3]) == first


def test_without_a_home_the_digest_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(al_pipeline.__file__).parent
    first = package_digest(package, MODULES[:3])
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("AL_HOME", str(tmp_path / "file/home"))
    assert package_digest(package, MODULES[:3]) == first


def test_the_digest_does_not_depend_on_the_process() -> None:
    """Neither on the seed of hashes nor on optimization."""
    command = (
        "import sys; from al_pipeline.workspace.code_digest import *; print(module_digest(open(sys.argv[1]).read()))"
    )
    path = str(Path(al_pipeline.__file__).parent / "active_learning/strategies.py")
    found = {
        subprocess.run(
            [sys.executable, *options, "-c", command, path], capture_output=True, text=True, timeout=120, check=True
        ).stdout.strip()
        for options in (["-R"], ["-R", "-O"], ["-OO"])
    }
    assert found == {module_digest(Path(path).read_text(encoding="utf-8"))}


def test_other_modules_do_not_change_the_fingerprint(copied: Path) -> None:
    before = current_engine()
    (copied / "cli/app.py").write_text("", encoding="utf-8")
    _engine.cache_clear()
    assert current_engine() == before


def test_the_fingerprint_is_json_and_comes_out_the_same_twice(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine.json")
    first = (tmp_path / "engine.json").read_bytes()
    _engine.cache_clear()
    write_json(tmp_path / "engine.json", current_engine())
    assert (tmp_path / "engine.json").read_bytes() == first
    assert json.loads(first) == current_engine()
    assert set(current_engine()) == {"version", "sources", "python", "packages", "machine", "cpu", "blas", "threads"}


def test_an_equal_record_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    write_engine(path)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    write_engine(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    write_json(path, {**current_engine(), "threads": 0})
    write_engine(path)
    assert read_json(path) == current_engine()


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "torch": lambda found: found["packages"].update(torch="1.0"),
    "cpu": lambda found: found.update(cpu=["avx"]),
    "threads": lambda found: found.update(threads=64),
    "python": lambda found: found.pop("python"),
    "numpy": lambda found: found["packages"].pop("numpy"),
    "colour": lambda found: found.update(colour="green"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_engine_is_refused_by_name(tmp_path: Path, key: str) -> None:
    other = json.loads(json.dumps(current_engine()))
    CHANGES[key](other)
    write_json(tmp_path / "engine.json", other)
    with pytest.raises(EngineChanged, match=rf"\b{key}: was .*, is .*`al round`") as caught:
        check_engine(tmp_path / "engine.json")
    assert str(caught.value).count(": was ") == 1


def test_another_release_that_computes_the_same_is_the_same_engine(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    write_json(path, {**current_engine(), "version": "0.0.1"})
    check_engine(path)
    write_engine(path)
    assert read_json(path)["version"] == "0.0.1", "else every stage would run again"


def test_this_engine_is_let_through(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine.json")
    check_engine(tmp_path / "engine.json")
    assert difference(read_json(tmp_path / "engine.json")) == ""


def test_no_record_is_another_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineChanged, match="absent"):
        check_engine(tmp_path / "engine.json")


def test_a_package_that_is_not_installed_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PACKAGES", ("al-no-such-package",))
    assert current_engine()["packages"] == {"al-no-such-package": "absent"}
