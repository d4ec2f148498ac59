"""DVC's configuration files, which its own writer keeps in ASCII alone."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from al_pipeline.errors import BadInput, RepositoryError
from al_pipeline.files import write_bytes


def change_config(path: Path, changes: Mapping[str, Mapping[str, Any]], mode: int) -> None:
    """Set values in a DVC configuration file, by section; write nothing if all are set already.

    DVC's own writer supports only ASCII, and leaves an empty file behind for other paths. Raises BadInput for a value
    that DVC would not read back as given, RepositoryError if the file is not a valid DVC configuration.
    """
    from configobj import ConfigObj, ConfigObjError

    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        config = ConfigObj(text.splitlines(), interpolation=False, list_values=True, encoding="utf-8")
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} cannot be read as DVC's configuration ({error}); fix or delete it") from None
    before = config.dict()
    for section, values in changes.items():
        known = config.setdefault(section, {})
        if not isinstance(known, dict):
            raise RepositoryError(f"{path} has a value named {section}, where DVC expects a section; fix or delete it")
        known.update(values)
    if config.dict() == before:
        return
    written = io.BytesIO()
    config.write(written)
    try:
        found = ConfigObj(io.StringIO(written.getvalue().decode())).dict()
    except (ConfigObjError, UnicodeDecodeError):
        found = {}
    for section, values in changes.items():
        for name, value in values.items():
            if found.get(section, {}).get(name) != value:
                raise BadInput(
                    f"DVC cannot store {value!r} in its configuration; choose a path without such characters"
                )
    write_bytes(path, written.getvalue(), mode)


def object_folders(root: Path) -> tuple[Path, Path | None]:
    """The folders of DVC's cache and of its default remote; None: the remote is no folder of this machine.

    By the settings of the repository at `root` alone. Raises RepositoryError if they are not valid.
    """
    from configobj import ConfigObj, ConfigObjError

    found: dict[str, dict[str, Any]] = {}
    for path in (root / ".dvc/config", root / ".dvc/config.local"):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            config = ConfigObj(text.splitlines(), interpolation=False, list_values=True)
        except (ConfigObjError, UnicodeDecodeError) as error:
            raise RepositoryError(f"{path} cannot be read as DVC's configuration ({error}); fix or delete it") from None
        for section, values in config.items():
            if isinstance(values, dict):
                found.setdefault(section, {}).update(values)
    remote = found.get(f'remote "{found.get("core", {}).get("remote")}"', {}).get("url")
    is_folder = isinstance(remote, str) and "://" not in remote
    base = root / ".dvc"
    cache = base / os.path.expanduser(str(found.get("cache", {}).get("dir", "cache")))
    return cache, base / os.path.expanduser(str(remote)) if is_folder else None


def utf8(path: str) -> str:
    """`path` as DVC will read it, independent of the locale.

    Raises BadInput if its bytes are not UTF-8 or it holds a control character: values of several lines are refused.
    """
    if not path.isprintable() and any(unicodedata.category(sign) == "Cc" for sign in path):
        raise BadInput(
            f"DVC cannot store {path!r} in its configuration: it contains a control character; rename that folder"
        )
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(
            f"{os.fsencode(path)!r} is not UTF-8, but DVC stores paths as UTF-8; rename that folder"
        ) from None
