"""One thread for linear algebra: with another number the order of summation would differ, and so would the bytes."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any


class _Found:
    """The linear algebra libraries of this process, and the number of modules when they were looked for."""

    modules: int = -1
    controller: Any = None


def one_thread() -> AbstractContextManager[Any]:
    """A context in which all linear algebra libraries of this process use one thread.

    Looking for them takes 20 ms, so it is done again only after further imports, which may have loaded others.
    """
    from threadpoolctl import ThreadpoolController

    if _Found.modules != len(sys.modules):
        _Found.controller = ThreadpoolController()
        _Found.modules = len(sys.modules)
    context: AbstractContextManager[Any] = _Found.controller.limit(limits=1)
    return context
