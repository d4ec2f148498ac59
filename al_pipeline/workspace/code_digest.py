"""A digest of what Python modules compute, independent of their wording and formatting.

Two versions of a module have the same digest if their syntax trees are equal after removal of what cannot change a
stage's output: docstrings and other bare strings, comments and formatting (which no tree has), the texts of
exceptions and assertions, a module logger and its calls, type annotations that nothing reads at run time, and private
functions that only such texts use. When in doubt, a part is kept: an unnecessary change of the digest costs a build, a
missing one hides a difference.

The tree is written out by field names, so that it does not depend on `ast.dump`; a minor release of Python may still
parse a module into other nodes. The fingerprint has the Python version as a separate part.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from al_pipeline import errors
from al_pipeline.errors import AlError
from al_pipeline.files import read_object, sha256_bytes, write_json
from al_pipeline.workspace.home import al_home, private_folder

_CACHE, _KEPT = "code-digests.json", 8
"""The cache file in `al`'s home, and the number of digests that it keeps."""
_SILENT = frozenset({"__future__", "typing", "collections.abc", "al_pipeline.logs"})
"""Modules used for types and logging only: their imports are dropped; any other name in use is still in the tree."""
_LOGGERS = frozenset({"_log", "_logger", "log", "logger"})
_EXCEPTIONS = frozenset(
    name
    for module in (builtins, errors)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)
_TEXT = ast.Constant("text")
_POSITIONS = frozenset({"ctx", "kind", "type_comment"})
"""Fields that add no information: a context follows from the position in the tree."""


def package_digest(package: Path, modules: Iterable[str]) -> str:
    """SHA-256 (hex) over the digests of `modules`, which are paths below `package`.

    Parsing takes half a second on a slow machine, so the digest is cached in `al`'s home under a hash of the files'
    bytes; if that folder cannot be used, it is computed each time. Raises OSError if a module cannot be read, and
    SyntaxError if it is not valid Python.
    """
    sources = {module: (package / module).read_bytes() for module in modules}
    key = _key(sources)
    known: dict[str, Any] = {}
    with suppress(AlError, OSError):
        known = read_object(al_home() / _CACHE)
        if isinstance(known.get(key), str):
            return str(known[key])
    rows = "".join(f"{module}\0{module_digest(source)}\n" for module, source in sources.items())
    digest = sha256_bytes(rows.encode())
    with suppress(AlError, OSError):
        write_json(private_folder(al_home()) / _CACHE, dict([*known.items(), (key, digest)][-_KEPT:]), 0o600)
    return digest


def _key(sources: Mapping[str, bytes]) -> str:
    key = hashlib.sha256(f"{sys.version}\n{sha256_bytes(Path(__file__).read_bytes())}\n".encode())
    for module, source in sources.items():
        key.update(f"{module}\0{sha256_bytes(source)}\n".encode())
    return key.hexdigest()


def module_digest(source: str | bytes) -> str:
    """SHA-256 (hex) of what a module computes. Raises SyntaxError if `source` is not valid Python."""
    tree = ast.fix_missing_locations(_Normalize().visit(ast.parse(source)))
    _remove_unused(tree)
    digest = hashlib.sha256()
    for part in _parts(tree):
        digest.update(part.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class _Normalize(ast.NodeTransformer):
    """Removes what cannot change a result (see the module's docstring)."""

    def __init__(self) -> None:
        self._in_class = False

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._scope(node, in_class=False)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._scope(node, in_class=True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        if not node.decorator_list:  # a decorator may read annotations, as singledispatch does
            node.returns = None
            arguments = node.args
            others = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *others]:
                argument.annotation = None
        return self._scope(node, in_class=False)

    def _scope(self, node: ast.AST, in_class: bool) -> ast.AST:
        before, self._in_class = self._in_class, in_class
        self.generic_visit(node)
        self._in_class = before
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            owner = value.func.value
            if isinstance(owner, ast.Name) and owner.id in _LOGGERS:
                return None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self._in_class:  # dataclasses, named tuples and structs read annotations
            return self.generic_visit(node)
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module in _SILENT and not node.level else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        match node:
            case ast.Assign([ast.Name(name)], ast.Call(ast.Name("get_logger"))) if name in _LOGGERS:
                return None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" and not node.orelse:
            return None
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            self._exception(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node.func:
            case ast.Name(id=name) if name in _EXCEPTIONS:
                self._exception(node)
            case ast.Attribute(value=ast.Name(id="sys"), attr="exit"):
                self._exception(node)
        return self.generic_visit(node)

    def _exception(self, call: ast.Call) -> None:
        """Replace the texts in a call that creates an exception; its other arguments are kept."""
        call.args = [_TEXT if _is_text(value) else value for value in call.args]
        for keyword in call.keywords:
            if _is_text(keyword.value):
                keyword.value = _TEXT


def _is_text(node: ast.expr) -> bool:
    """Whether an expression builds a text from a string literal."""
    match node:
        case ast.JoinedStr() | ast.Constant(value=str()):
            return True
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod(), right=right):
            return _is_text(left) or _is_text(right)
        case ast.Subscript(value=value):
            return _is_text(value)
        case ast.Call(func=ast.Attribute(value=owner, attr="join" | "format")):
            return _is_text(owner)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_text(body) and _is_text(orelse)
    return False


def _remove_unused(tree: ast.Module) -> None:
    """Remove private functions and constants that nothing in the module uses any more.

    They built texts that were removed. No module may import another's private names (a test checks that).
    """
    while True:
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        kept = [node for node in tree.body if not _is_private(node) or _name(node) in named]
        if len(kept) == len(tree.body):
            return
        tree.body = kept


def _name(node: ast.stmt) -> str:
    match node:
        case ast.FunctionDef(name=name, decorator_list=[]):
            return name
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant()):
            return name
    return ""


def _is_private(node: ast.stmt) -> bool:
    return _name(node).startswith("_") and not _name(node).startswith("__")


def _parts(node: Any) -> Iterable[str]:
    """Yield the tree as text: class and fields of each node, type and `repr` of anything else."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in _POSITIONS:
                yield f" {name}="
                yield from _parts(value)
            elif value is None and name == "value" and isinstance(node, ast.Constant):
                yield " None"
        yield ")"
    elif isinstance(node, list):
        yield "["
        for each in node:
            yield from _parts(each)
            yield ","
        yield "]"
    else:
        yield f"{type(node).__name__}:{node!r}"
