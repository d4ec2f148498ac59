"""The installed package that a module belongs to, and a digest of its files. Nothing of it is imported."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, packages_distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from al_pipeline.errors import AlError
from al_pipeline.file_notes import FileNotes, file_mark, settled
from al_pipeline.files import sha256_bytes, sha256_file
from al_pipeline.workspace.home import al_home

_NOTES = "packages"
"""The folder in `al`'s home with the digests of packages, valid until one of their files changes."""
_CODE = tuple([*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES])


@cache
def package_of(module: str) -> Distribution | None:
    """The installed package that has a top-level module; None for a module of Python itself, too."""
    if module in sys.stdlib_module_names:
        return None
    names = sorted(set(packages_distributions().get(module, ())))
    return distribution(names[0]) if names else _editable_with(module)


def version_of(package: str) -> str:
    """The version of an installed package; `absent` if there is none."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return "absent"


def package_digest(package: Distribution, module: str) -> str:
    """SHA-256 (hex) of the files of a package, by name and content: equal wherever the same wheel is installed.

    These are the files that its RECORD lists; if it has none or is installed for development, the code files of its
    top-level `module`. What an installer writes by itself (bytecode, scripts, notes about the installation) does not
    count. They are read again only if one of them has changed. Raises OSError if one cannot be read.
    """
    files = dict(sorted((_listed(package) or _sources(module)).items()))
    notes, key = _notes(), f"package://{package.name}{package.locate_file('')}#{module}"
    marks = _marks(files)
    mark = [sha256_bytes(json.dumps(marks).encode())]
    if (known := notes.known(key, mark)) is not None:
        return known
    rows = [f"{name}\0{sha256_file(path) if marks[name] else 'missing'}\n" for name, path in files.items()]
    digest = sha256_bytes("".join(rows).encode("utf-8", "surrogateescape"))
    if _marks(files) == marks and all(settled(found) for found in marks.values() if found):
        notes.remember(key, mark, digest)
        notes.save()
    return digest


def _notes() -> FileNotes:
    """The digests that are known; none are kept if `al`'s home cannot be used."""
    try:
        return FileNotes(al_home() / _NOTES)
    except AlError:
        return FileNotes()


def _marks(files: dict[str, Path]) -> dict[str, list[int]]:
    """The mark of each file; empty for one that is missing."""
    marks = {}
    for name, path in files.items():
        try:
            marks[name] = file_mark(path)
        except FileNotFoundError:
            marks[name] = []
    return marks


def _listed(package: Distribution) -> dict[str, Path]:
    """The files that a package was installed with; empty if no list says so, or if its code lies elsewhere."""
    rows = csv.reader((package.read_text("RECORD") or "").splitlines())
    names = [row[0] for row in rows if row and _counts(row[0])]
    return {} if _project(package) else {name: Path(str(package.locate_file(name))) for name in names}


def _counts(name: str) -> bool:
    """Whether a file of RECORD is the package's, and neither its installer's nor outside the folder of packages."""
    parts = name.split("/")
    return not (name.startswith("/") or ".." in parts or "__pycache__" in parts or parts[0].endswith(".dist-info"))


def _sources(module: str) -> dict[str, Path]:
    """The code files of a top-level module, which is not imported."""
    found: dict[str, Path] = {}
    for place in _places(module):
        paths = place.rglob("*") if place.is_dir() else [place]
        found |= {str(path.relative_to(place.parent)): path for path in paths if path.name.endswith(_CODE)}
    return found


def _places(module: str) -> Iterator[Path]:
    """The folders of a top-level module, or its file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module in `sys.modules` without a specification
        return
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
    elif spec is not None and spec.origin:
        yield Path(spec.origin)


def _editable_with(module: str) -> Distribution | None:
    """The package, installed for development, whose project has the module: not all installers list its modules."""
    places = [place.resolve() for place in _places(module)]
    projects = [(found, project) for found in distributions() if (project := _project(found))]
    holding = [
        (len(project.parts), found)
        for found, project in projects
        if any(place.is_relative_to(project) for place in places)
    ]
    return max(holding, key=lambda one: one[0])[1] if holding else None


def _project(package: Distribution) -> Path | None:
    """The folder of a package that is installed for development (PEP 610); None for others."""
    try:
        found: Any = json.loads(package.read_text("direct_url.json") or "{}")
        editable = found["dir_info"]["editable"] is True
        url = urlsplit(found["url"])
    except (ValueError, KeyError, TypeError):
        return None
    return Path(unquote(url.path)).resolve() if editable and url.scheme == "file" else None
