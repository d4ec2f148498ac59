"""The length of the package's functions and modules, at two commits.

    python -m benchmarks.functions [BEFORE] [AFTER]      writes benchmarks/results/functions.json

The default is from the last release of the flat layout to HEAD. A function's lines run from its `def` to its end,
including its docstring and nested functions; `without_docstring` excludes its own docstring.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks.record import ROOT, record

BEFORE = "fe897ae"
PACKAGE = "al_pipeline"
LONGEST = 20
LIMIT = 40
"""The number of lines above which a function counts as long."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", default=BEFORE, help="a commit")
    parser.add_argument("after", nargs="?", default="HEAD", help="a later one")
    options = parser.parse_args()
    figures = {"before": measure(options.before), "after": measure(options.after)}
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("functions", figures).relative_to(ROOT))  # noqa: T201


def measure(commit: str) -> dict[str, Any]:
    """Counts at `commit`, and its longest functions and modules."""
    modules = read_modules(commit)
    rows = [row for name, text in modules.items() for row in _functions(name, text)]
    lines = {name: text.count("\n") for name, text in modules.items()}
    return {
        "commit": _git("rev-parse", commit).decode().strip(),
        "modules": len(modules),
        "lines": sum(lines.values()),
        "median_module_lines": median(lines.values()),
        "functions": len(rows),
        "median_function_lines": median(row["lines"] for row in rows),
        f"functions_over_{LIMIT}_lines": sum(row["lines"] > LIMIT for row in rows),
        "longest_functions": sorted(rows, key=lambda row: (-row["lines"], row["function"]))[:LONGEST],
        "longest_modules": [
            {"module": name, "lines": lines[name]} for name in sorted(lines, key=lambda name: -lines[name])[:LONGEST]
        ],
    }


def read_modules(commit: str) -> Mapping[str, str]:
    """The source of every module of the package at `commit`, by its dotted name."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, PACKAGE))) as archive:
        for member in archive:
            if member.name.endswith(".py") and (file := archive.extractfile(member)):
                name = member.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                found[name] = file.read().decode("utf-8")
    return found


def _functions(module: str, text: str) -> Iterator[dict[str, Any]]:
    """Every function and method of a module, with its lines."""

    def visit(node: ast.AST, outer: str) -> Iterator[dict[str, Any]]:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, Function | ast.ClassDef):
                name = f"{outer}.{child.name}"
            if isinstance(child, Function):
                lines = _lines(child)
                yield {"function": name, "lines": lines, "without_docstring": lines - _docstring_lines(child)}
            yield from visit(child, name)

    yield from visit(ast.parse(text), module.removeprefix(f"{PACKAGE}."))


def _lines(node: Function | ast.Expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _docstring_lines(function: Function) -> int:
    first = function.body[0]
    return _lines(first) if ast.get_docstring(function) is not None and isinstance(first, ast.Expr) else 0


def _git(*words: str) -> bytes:
    return subprocess.run(("git", *words), cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
