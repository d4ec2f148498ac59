"""Change the classes in a `params.yaml`: the list with its descriptions, its version, and the classes' guides.

Text is replaced at the positions that the parser gives, so that comments and all other lines stay (`params_file` says
why not by ruamel.yaml). The result is parsed again, and must hold exactly what was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.errors import BadParams
from al_pipeline.params import Meaning, Params, parse_params
from al_pipeline.records import ClassChange
from al_pipeline.sanitize import JOINERS

_LONGEST_DESCRIPTION, _MOST_EXAMPLES = 500, 20


class NewClass(Struct, frozen=True):
    """A class of the new list; `was`: the class whose entry in the file it keeps, apart from the name."""

    name: str
    meaning: Meaning = Meaning()
    was: str | None = None


def with_change(text: str, change: ClassChange, classes: Sequence[str]) -> str:
    """`text`, a `params.yaml`, after a change that leads to `classes`, with the next version of the schema.

    A renamed class keeps its description, its examples and its guide. Merged ones have all of theirs together, as far
    as there is room, unless the class that they become was there before and has a description. A split class gives its
    parts none. Raises BadParams if the file cannot be changed.
    """
    before = parse_params(text)
    meanings, guide = before.schema_.meanings, before.select.guide
    listed = []
    for name in classes:
        if name in before.schema_.labels:
            listed.append(NewClass(name, meanings.get(name, Meaning()), name))
        elif change.kind == "rename" and name in change.new:
            listed.append(NewClass(name, meanings.get(change.old[0], Meaning()), change.old[0]))
        else:
            listed.append(NewClass(name))
    if change.kind == "merge":
        merged = _merged([meanings.get(name, Meaning()) for name in change.old])
        target = change.new[0]
        own = meanings.get(target, Meaning()).description
        meaning = Meaning(description=own or merged.description, examples=merged.examples)
        listed = [NewClass(target, meaning) if one.name == target else one for one in listed]
    guides = {name: texts for name, texts in guide.items() if name not in change.old}
    moved = [text for name in change.old for text in guide.get(name, [])]
    if moved and change.kind in ("rename", "merge"):
        guides[change.new[0]] = list(dict.fromkeys([*guides.get(change.new[0], []), *moved]))
    return with_classes(text, listed, guides)


def with_classes_of(text: str, other: str, known: Sequence[str]) -> str:
    """`text` with the classes, descriptions and guides of `other`, and the next version of the schema.

    Classes that `known` lacks were added to `text` by hand, and stay, after the others. Raises BadParams.
    """
    now, then = parse_params(text), parse_params(other)
    own = [name for name in now.schema_.labels if name not in known and name not in then.schema_.labels]

    def entry(name: str) -> NewClass:
        source = then if name in then.schema_.labels else now
        return NewClass(name, source.schema_.meanings.get(name, Meaning()), name)

    guides = then.select.guide | {name: now.select.guide[name] for name in own if name in now.select.guide}
    return with_classes(text, [entry(name) for name in (*then.schema_.labels, *own)], guides)


def with_classes(text: str, classes: Sequence[NewClass], guide: Mapping[str, Sequence[str]]) -> str:
    """`text` with these classes and guides, and the next version of the schema. Raises BadParams if it is not valid."""
    before = parse_params(text)
    version = before.schema_.version + 1
    schema = replace(
        before.schema_,
        version=version,
        labels=[one.name for one in classes],
        meanings={one.name: one.meaning for one in classes if one.meaning != Meaning()},
    )
    guides = {name: list(texts) for name, texts in guide.items()}
    wanted = replace(before, schema_=schema, select=replace(before.select, guide=guides))
    problem = "its `schema.labels` are written in an unusual way"
    for block in (True, False):
        try:
            edited = _edited(text, before, classes, version, guides, block=block)
            if _same(parse_params(edited), wanted):
                return edited
        except (BadParams, yaml.YAMLError) as error:
            problem = str(error)
    raise BadParams(f"params.yaml cannot be changed automatically: {problem}")


def _same(found: Params, wanted: Params) -> bool:
    return found == wanted and list(found.schema_.labels) == list(wanted.schema_.labels)


def _edited(
    text: str,
    before: Params,
    classes: Sequence[NewClass],
    version: int,
    guide: Mapping[str, Sequence[str]],
    *,
    block: bool,
) -> str:
    """`text` with new values; `block`: the list keeps the lines of the entries that stay."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""  # the parser counts it as a column
    text = text.removeprefix(mark)
    places = dict(_places(yaml.compose(text, yaml.SafeLoader)))
    edits = [(*_span(text, places["schema", "version"]), str(version))]
    labels = places["schema", "labels"]
    lines = _entry_lines(text, labels) if block else None
    if lines is None:
        edits.append((*_span(text, labels), _flow([_value(one) for one in classes])))
    else:
        end = "\r\n" if "\r\n" in text else "\n"
        old = dict(zip(before.schema_.labels, lines.entries, strict=True))
        new = "".join(_lines_of(one, old, before, lines.indent, end) for one in classes)
        edits.append((lines.start, lines.stop, new if text[: lines.stop].endswith(end) else new.removesuffix(end)))
    if dict(guide) != before.select.guide:
        edits.append((*_span(text, places["select", "guide"]), _flow(dict(guide))))
    for start, stop, value in sorted(edits, reverse=True):
        text = text[:start] + value + text[stop:]
    return mark + text


class _Entry(Struct, frozen=True):
    """The text of an entry of the list, with its comments, and where its name is in it."""

    text: str
    name: tuple[int, int]


class _Entries(Struct, frozen=True):
    """The lines of a list that has each entry on lines of its own."""

    start: int
    stop: int
    indent: str
    entries: tuple[_Entry, ...]


def _entry_lines(text: str, labels: yaml.Node) -> _Entries | None:
    """The lines of the list; None if its entries do not have lines of their own."""
    if not isinstance(labels, yaml.SequenceNode) or labels.flow_style or not labels.value:
        return None
    column = labels.start_mark.column
    starts = [text.rfind("\n", 0, node.start_mark.index) + 1 for node in labels.value]
    last = _span(text, labels)[1]
    stop = text.find("\n", last) + 1 or len(text)
    entries = []
    for node, start, following in zip(labels.value, starts, [*starts[1:], stop], strict=True):
        if text[start : start + column].strip() or text[start + column] != "-":
            return None
        name = next((v for k, v in node.value if k.value == "name"), None) if isinstance(node.value, list) else node
        if not isinstance(name, yaml.ScalarNode):
            return None
        begin, end = _span(text, name)
        entries.append(_Entry(text[start:following], (begin - start, end - start)))
    return _Entries(starts[0], stop, " " * column, tuple(entries))


def _lines_of(one: NewClass, old: Mapping[str, _Entry], before: Params, indent: str, end: str) -> str:
    """The lines of a class: those of its present entry, with another name if needed, or new ones."""
    entry = old.get(one.was or "")
    if entry is not None and one.meaning == before.schema_.meanings.get(one.was or "", Meaning()):
        kept = entry.text if entry.text.endswith("\n") else entry.text + end
        start, stop = entry.name
        return kept if one.name == one.was else kept[:start] + _flow(one.name) + kept[stop:]
    value = _value(one)
    if isinstance(value, str):
        return f"{indent}- {_flow(value)}{end}"
    lines = [f"{name}: {_flow(part)}" for name, part in value.items()]
    return f"{indent}- " + f"{end}{indent}  ".join(lines) + end


def _value(one: NewClass) -> str | dict[str, Any]:
    """An entry of `schema.labels`: a name, or with what there is to say about it."""
    said = {"description": one.meaning.description, "examples": one.meaning.examples}
    known = {name: value for name, value in said.items() if value}
    return {"name": one.name, **known} if known else one.name


def _merged(meanings: Sequence[Meaning]) -> Meaning:
    said = "; ".join(dict.fromkeys(one.description for one in meanings if one.description))
    examples = list(dict.fromkeys(text for one in meanings for text in one.examples))
    return Meaning(description=said if len(said) <= _LONGEST_DESCRIPTION else "", examples=examples[:_MOST_EXAMPLES])


def _places(document: Any) -> Iterator[tuple[tuple[str, str], yaml.Node]]:
    """The values of the keys of all sections."""
    for section, values in document.value:
        for key, value in values.value if isinstance(values, yaml.MappingNode) else ():
            yield (section.value, key.value), value


def _span(text: str, node: yaml.Node) -> tuple[int, int]:
    """Start and end of a value. (The parser ends a block at the next token, after comments and blank lines.)"""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        below = node.value[-1]
        return node.start_mark.index, _span(text, below[1] if isinstance(below, tuple) else below)[1]
    start, end = node.start_mark.index, node.end_mark.index
    return start, start + len(text[start:end].rstrip())


def _flow(value: Any) -> str:
    """A value as JSON, which YAML reads too, on one line; characters that hide or reverse text are escaped."""
    return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))


def _escaped(character: str) -> str:
    if character.isprintable() or character in JOINERS or "\U000e0020" <= character <= "\U000e007f":
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"
