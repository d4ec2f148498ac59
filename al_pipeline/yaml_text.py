"""Read YAML that anybody may have written, such as the files of a clone."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 100
"""The deepest nesting that is read. libyaml ends the process some ten thousand levels down, after minutes."""

SafeLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""PyYAML's safe loader, in C if it has one."""


def read_yaml(text: str, loader: Any = SafeLoader, *, aliases: bool = True) -> Any:
    """The value of a YAML text.

    `loader`: a subclass of `SafeLoader`. Raises YAMLError if it is not valid or nested deeper than DEEPEST, and without
    `aliases` for an alias: a few lines of them could expand to more than memory.
    """
    try:
        _check_events(text, loader, aliases)
        return yaml.load(text, loader)
    except ValueError as error:  # half a character, or a scalar that is no value, such as the 45th of a month
        raise yaml.YAMLError(str(error)) from None


def _check_events(text: str, loader: Any, aliases: bool) -> None:
    depth = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise yaml.YAMLError(f"aliases are not supported; write the value out, {str(event.start_mark).strip()}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} levels deep, {str(event.start_mark).strip()}")
