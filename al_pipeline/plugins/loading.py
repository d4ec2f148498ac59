"""Import a plug-in, once the user trusts it. Code of the workspace is compiled from the bytes that were trusted."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from al_pipeline.errors import AlError, BadInput, BadParams
from al_pipeline.plugins.references import Reference, check_trusted

_loaded: dict[str, tuple[str, ModuleType]] = {}
"""Modules of the workspace, by name, with the digest of what was compiled."""


def load(reference: Reference) -> Any:
    """What the reference names. Raises BadParams if it cannot be imported, UnexpectedChange if it is not trusted."""
    if reference.missing:
        raise BadParams(reference.missing)
    check_trusted(reference)
    try:
        found: Any = _compiled(reference) if reference.file else importlib.import_module(reference.module)
    except ModuleNotFoundError as error:
        raise BadParams(
            f"{reference.where}: there is no module {error.name!r}; check the spelling, or `pip install` it into the "
            "environment of `al`"
        ) from None
    except Exception as error:
        raise BadParams(
            f"{reference.where}: importing {reference.module} raised {said(error)}; fix it there"
        ) from error
    for part in reference.attribute.split("."):
        if not hasattr(found, part):
            raise BadParams(
                f"{reference.where}: {reference.module} has no attribute {reference.attribute!r}; check the spelling"
            )
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def calling(reference: Reference, what: str) -> Iterator[None]:
    """Errors of the plug-in's code as BadInput that names it and `what` was called."""
    try:
        yield
    except AlError:
        raise
    except Exception as error:
        raise BadInput(f"{reference.where}: {what} raised {said(error)}; fix it in {reference.package}") from error


def said(error: Exception) -> str:
    """An error of somebody else's code on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _compiled(reference: Reference) -> ModuleType:
    """The module of a file in the workspace.

    Python would write its bytecode beside it, and read bytecode that came with the workspace.
    """
    digest, module = _loaded.get(reference.module, ("", None))
    if module is None or digest != reference.digest or module.__file__ != str(reference.file):
        module = ModuleType(reference.module)
        module.__file__ = str(reference.file)
        code = compile(reference.source, str(reference.file), "exec", dont_inherit=True)
        before = sys.modules.get(reference.module)
        sys.modules[reference.module] = module  # where classes of the module are looked for
        try:
            exec(code, vars(module))
        except BaseException:
            if before is None:
                del sys.modules[reference.module]
            else:
                sys.modules[reference.module] = before
            raise
        _loaded[reference.module] = reference.digest, module
    sys.modules[reference.module] = module
    return module
