"""Add the keys that the template has gained to a `params.yaml`; the user's values, comments and order are kept.

Inserts lines of the template between lines of the user's file, at the parser's positions; the result is parsed again
and must hold exactly the user's values and the new ones. No byte of the user's file changes.

ruamel.yaml keeps comments too, and was tested for this and for `al schedule` (0.19.1, given the file's indentation).
It rewrites the whole file: 12 of the 22 variants in `tests/test_params_file.py` came back with other bytes although
nothing was to change (sections of different depth, blanks after `:` and in brackets, multi-line values, `---`, a
missing final newline). It also attaches a comment above a key to the previous key, so that a key inserted between the
two gets that comment. `al init`, which fills in the template, uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from al_pipeline.errors import BadParams
from al_pipeline.yaml_text import read_yaml

Path = tuple[str, ...]


def with_missing(text: str, template: str, source: str = "params.yaml") -> tuple[str, tuple[str, ...]]:
    """`text` with the keys of `template` that it lacks, and the dotted names of the keys that were added.

    Existing keys keep their values. Raises BadParams if `text` is not a YAML mapping, or if no line can be inserted (a
    section in braces): the message names the keys to add by hand.
    """
    values, whole = _values(text), read_yaml(template)
    if values is None:
        raise BadParams(f"{source} is not valid YAML, or has no keys and values; fix it first")
    added = list(_missing(values, whole))
    mark = "\ufeff" if text.startswith("\ufeff") else ""  # byte order mark: the parser counts it as a column
    extended = text.removeprefix(mark)
    for path in added:
        if _values(extended) is not None:
            extended = _insert(extended, template, path) or extended
    if _values(extended) != _merged(values, whole):
        names = ", ".join(".".join(path) for path in added)
        raise BadParams(
            f"{source} cannot be extended line by line (is a section in braces?); add these keys by hand: {names}"
        )
    return mark + extended, tuple(".".join(path) for path in added)


def _values(text: str) -> dict[str, Any] | None:
    try:
        values = read_yaml(text, aliases=False)
    except yaml.YAMLError:
        return None
    return values if isinstance(values, dict) else None


def _missing(values: dict[str, Any], template: dict[str, Any], above: Path = ()) -> Iterator[Path]:
    """Yield the paths of template keys that `values` lacks; for a missing section only the section's."""
    for key, value in template.items():
        if key not in values:
            yield (*above, key)
        elif isinstance(value, dict) and isinstance(values[key], dict):
            yield from _missing(values[key], value, (*above, key))


def _merged(values: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in template.items():
        if key not in values:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(values[key], dict):
            merged[key] = _merged(values[key], value)
    return merged


def _insert(text: str, template: str, path: Path) -> str | None:
    """Insert the template's lines for the key at `path` after the key that precedes it there; None if impossible."""
    section, there = _mapping(text, path[:-1]), _mapping(template, path[:-1])
    if section is None or there is None:
        return None
    lines, block = text.split("\n"), _block(template.split("\n"), there, path[-1])
    known = {key.value: (key, value) for key, value in section.value}
    before = [key.value for key, _ in there.value[: _index(there, path[-1])]]
    nearest = next((known[name] for name in reversed(before) if name in known), None)
    first = section.value[0][0].start_mark
    place = first.line if nearest is None else _after(lines, *nearest)
    if not path[:-1] and len(block) > 1:  # the template has blank lines between sections
        block = ["", *block] if place and lines[place - 1].strip() else block
        block = [*block, ""] if place < len(lines) and lines[place].strip() else block
    shift = first.column - there.value[0][0].start_mark.column
    moved = [" " * shift + line if line else line for line in block] if shift >= 0 else [x[-shift:] for x in block]
    end = "\r" if lines[0].endswith("\r") else ""
    return "\n".join([*lines[:place], *(line + end for line in moved), *lines[place:]])


def _mapping(text: str, path: Path) -> yaml.MappingNode | None:
    """The mapping at `path`; None if it is empty or in braces."""
    node = yaml.compose(text, yaml.SafeLoader)
    for name in path:
        assert isinstance(node, yaml.MappingNode)
        node = node.value[_index(node, name)][1]
    return node if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style else None


def _index(mapping: yaml.MappingNode, name: str) -> int:
    return next(row for row, (key, _) in enumerate(mapping.value) if key.value == name)


def _block(lines: list[str], mapping: yaml.MappingNode, name: str) -> list[str]:
    """The lines of one key with its value, and the comment lines directly above it; one indented deeper is not its."""
    key, value = mapping.value[_index(mapping, name)]
    first = key.start_mark.line
    while first > 1 and lines[first - 1].lstrip().startswith("#") and not _deeper(lines[first - 1], key):
        first -= 1
    return lines[first : _after(lines, key, value)]


def _after(lines: list[str], key: yaml.Node, value: yaml.Node) -> int:
    """The index of the line after a key, its value and the comments below that are indented deeper than the key."""
    place = max(_last(key), _last(value)) + 1
    while place < len(lines) and lines[place].lstrip().startswith("#") and _deeper(lines[place], key):
        place += 1
    return place


def _deeper(line: str, key: yaml.Node) -> bool:
    return len(line) - len(line.lstrip()) > int(key.start_mark.column)


def _last(node: yaml.Node) -> int:
    """The index of a node's last line. (The parser ends a block at the next token, after blank lines.)"""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        below = node.value[-1]
        return max(map(_last, below)) if isinstance(below, tuple) else _last(below)
    return int(node.end_mark.line) - (node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line)
