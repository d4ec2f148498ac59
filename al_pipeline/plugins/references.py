"""Where the code of a plug-in lies, and what it is made of. Nothing of it is imported to find that out."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path

from al_pipeline.errors import BadParams, UnexpectedChange
from al_pipeline.files import sha256_bytes
from al_pipeline.params import PLUGIN_GROUPS, PluginKind, PluginName
from al_pipeline.plugins.packages import package_digest, package_of, version_of
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import is_accepted

FOLDER = Layout().plugins.name
"""The first part of the names of modules that lie in the workspace: `plugins.mine` is `plugins/mine.py`."""
SAVED_WITH = ("scikit-learn", "skops")
"""The packages that every model of a plug-in is saved with."""

KEYS: dict[PluginKind, str] = {
    "model": "train.model",
    "strategy": "select.strategy",
    "redaction": "serve.log.redact",
}
"""The key of `params.yaml` that names a plug-in of each kind."""

_SHOWN = 12
"""Length of a digest in a record."""


_named_by_the_user: set[bytes] = set()
"""The claims of plug-ins that the user named on the command line of this process, which is to run them."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A plug-in that `params.yaml` names, found but not imported."""

    kind: PluginKind
    name: str
    """As `params.yaml` says it."""
    module: str
    attribute: str
    file: Path | None
    """The module's file, if it lies in the workspace."""
    source: bytes
    """The content of that file; empty for an installed package."""
    package: str
    """The package that it comes from, with its version; or the file's name in the workspace."""
    digest: str
    """SHA-256 of the file in the workspace, or of the package's files."""
    missing: str = ""
    """Why it is not here, for one that only a saved model names."""

    @property
    def key(self) -> str:
        """The key of `params.yaml` that names such a plug-in."""
        return KEYS[self.kind]

    @property
    def where(self) -> str:
        """The key and the name, as messages begin."""
        return f"{self.key} {self.name!r}"

    @property
    def claim(self) -> bytes:
        """What a user trusts: this very content of a file in the workspace, or this name in a package's very files."""
        if self.file:
            return b"\0".join([b"plug-in", self.package.encode(), self.source])
        parts = ("plug-in", f"{self.module}:{self.attribute}", self.package.partition(" ")[0], self.digest)
        return "\0".join(parts).encode()

    @property
    def trusted(self) -> bool:
        """Whether the user lets it run on this machine. Raises UnsafeFolder if others could have said so."""
        return self.claim in _named_by_the_user or is_accepted(self.claim)

    @property
    def record(self) -> str:
        """Package and version, or the file, with the digest of its sources: for `engine.json`."""
        return f"{self.package} ({self.digest[:_SHOWN]})"


def find(plugin: PluginName, root: Path) -> Reference:
    """Find the plug-in that `params.yaml` of the workspace `root` names. Raises BadParams if it is not there."""
    target = plugin.name if ":" in plugin.name else _entry_point(plugin)
    module, _, attribute = target.partition(":")
    first, _, rest = module.partition(".")
    if first == FOLDER:
        return _in_workspace(plugin, root, rest, attribute)
    package = package_of(first)
    if package is None:
        raise BadParams(
            f"{_said(plugin)}: no installed package has the module {first!r}; `pip install` it into the environment "
            f"of `al`, or put the code into {FOLDER}/NAME.py of the workspace and write {FOLDER}.NAME:{attribute}"
        )
    name = f"{package.name} {package.version}"
    return Reference(plugin.kind, plugin.name, module, attribute, None, b"", name, package_digest(package, first))


def find_for_saved(plugin: PluginName, root: Path) -> Reference:
    """The same for a saved model, which can often be loaded without the plug-in: one that is missing is no error."""
    try:
        return find(plugin, root)
    except BadParams as error:
        module, _, attribute = plugin.name.partition(":")
        return Reference(plugin.kind, plugin.name, module, attribute, None, b"", plugin.name, "", str(error))


def find_in(library: Path, name: str, package: str) -> Reference | None:
    """The plug-in `name` of a package in another environment's folder of packages; None if the package lacks it.

    The kind of one named `package.module:name` is not known: it counts as a model.
    """
    for found in distributions(name=package, path=[str(library)]):
        points = [point for point in found.entry_points if point.name == name and point.group in PLUGIN_GROUPS.values()]
        target = name if ":" in name else next((point.value.replace(" ", "") for point in points), "")
        module, _, attribute = target.partition(":")
        if attribute:
            kind: PluginKind = next(
                (kind for kind, group in PLUGIN_GROUPS.items() if points and points[0].group == group), "model"
            )
            digest = package_digest(found, module.partition(".")[0])
            return Reference(kind, name, module, attribute, None, b"", f"{found.name} {found.version}", digest)
    return None


def let_run(reference: Reference) -> None:
    """Let a plug-in run in this process, since the user named it on the command line."""
    _named_by_the_user.add(reference.claim)


def check_trusted(reference: Reference) -> None:
    """Raise UnexpectedChange if the user has not let this plug-in run on this machine."""
    if not reference.trusted:
        raise UnexpectedChange(
            f"{reference.where} runs code of {reference.package}, which is not trusted on this machine. If this "
            "workspace comes from somebody else, inspect it first; `al trust` shows it and lets it run"
        )


def record(plugins: Sequence[PluginName], root: Path) -> dict[str, str]:
    """What the plug-ins are made of, as `record_of` says it. Raises BadParams."""
    return record_of(find(plugin, root) for plugin in plugins)


def record_of(references: Iterable[Reference]) -> dict[str, str]:
    """What plug-ins are made of, for `engine.json`: packages with versions and digests, by name; sorted.

    A file in the workspace also brings the versions of the packages that it imports.
    """
    found: dict[str, str] = {}
    for reference in references:
        found[reference.name] = reference.record
        packages = {*_imported(reference.source), *(SAVED_WITH if reference.kind == "model" else ())}
        found |= {name: version_of(name) for name in packages}
    return dict(sorted(found.items()))


def _in_workspace(plugin: PluginName, root: Path, name: str, attribute: str) -> Reference:
    file = root / FOLDER / f"{name}.py"
    if not name or "." in name or not file.is_file() or file.is_symlink() or file.parent.is_symlink():
        raise BadParams(
            f"{_said(plugin)}: {FOLDER}/{name or 'NAME'}.py is not a file in the workspace; a plug-in there is a "
            f"single file, {FOLDER}/NAME.py, named as {FOLDER}.NAME:{attribute}"
        )
    source = file.read_bytes()
    shown = f"{FOLDER}/{name}.py"
    module = f"{FOLDER}.{name}"
    return Reference(plugin.kind, plugin.name, module, attribute, file, source, shown, sha256_bytes(source))


def _entry_point(plugin: PluginName) -> str:
    group = PLUGIN_GROUPS[plugin.kind]
    values = sorted({point.value.replace(" ", "") for point in entry_points(group=group, name=plugin.name)})
    if len(values) != 1 or ":" not in values[0]:
        told = f"means several things: {', '.join(values)}" if values else "is the name of no entry point"
        raise BadParams(
            f"{_said(plugin)} {told} in the group {group} of installed packages; write package.module:name instead"
        )
    return values[0]


def _said(plugin: PluginName) -> str:
    return f"{KEYS[plugin.kind]} {plugin.name!r}"


def _imported(source: bytes) -> set[str]:
    """The packages that a module imports anywhere, al-pipeline aside: the engine is recorded already."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    tops: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            tops.add(node.module.partition(".")[0])
    return {found.name for top in tops - {"al_pipeline"} if (found := package_of(top)) is not None}
