"""Values read from a file as a `msgspec.Struct`, checked field by field: every wrong key is reported at once.

`msgspec.convert` alone stops at the first wrong key, and takes sets for lists and infinity for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from al_pipeline.sanitize import storable

_S = TypeVar("_S", bound=msgspec.Struct)
_Key = tuple[str | int, ...]

_PLAIN = frozenset({NoneType, bool, int, float, str, list, dict})
"""The types of JSON's values. YAML has others: dates, sets, bytes."""
_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}
_SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "names"}
_OPEN = {"gt": "more than {:,}", "ge": "at least {:,}", "lt": "less than {:,}", "le": "at most {:,}"}
_UNKNOWN = ": no such key"
_LIMITS = (*_OPEN, "min_length", "max_length")


def parse(kind: type[_S], values: Any, source: str) -> _S:
    """`values` as `kind`. Raises ValueError with a line for each wrong key: its name, its value and what it takes.

    A function among the metadata of a field's type gets the converted value, and returns the one to keep or raises
    ValueError.
    """
    problems: list[str] = []
    made = _value(kind, values, (), problems)
    if problems:
        advice = {problem: "; remove it or fix its spelling" for problem in problems if problem.endswith(_UNKNOWN)}
        raise ValueError("\n".join(f"{source}: {problem}{advice.get(problem, '')}" for problem in problems))
    assert isinstance(made, kind)
    return made


def first_problem(kind: type[msgspec.Struct], values: Any) -> str | None:
    """What is wrong first if `values` are read as `kind`: the key, its value and what it takes; None if nothing is."""
    problems: list[str] = []
    _value(kind, values, (), problems)
    return problems[0] if problems else None


def takes(kind: Any, shown: Callable[[Any], str] = repr) -> str:
    """The type and the limits of a field in words; `shown` formats each choice."""
    plain, notes = _split(kind)
    if own := next((one.takes for one in notes if hasattr(one, "takes")), None):
        return str(own(shown))
    limits = {name: bound for one in notes for name in _LIMITS if (bound := getattr(one, name, None)) is not None}
    size = _range(limits.get("min_length"), limits.get("max_length"))
    described = " ".join(filter(None, (getattr(one, "description", None) for one in notes)))
    origin = get_origin(plain)
    if origin in (Union, UnionType):
        return " or ".join(takes(one, shown) for one in get_args(plain))
    if origin is Literal:
        choices = [shown(choice) for choice in get_args(plain)]
        return f"one of {', '.join(choices)}" if choices[1:] else f"{choices[0]} alone"
    if origin in (list, tuple):
        inner = described or _SEVERAL.get(_split(get_args(plain)[0])[0], "values")
        return f"list of {size or 'any number of'} {inner}"
    if plain not in _KINDS:
        return f"mapping of {size} {described}" if described else "keys and values"
    if plain is str:
        return " ".join(filter(None, ["text", size and f"of {size} characters", described]))
    if {"gt", "lt"} & limits.keys():
        return ", ".join(
            [_KINDS[plain], *(form.format(limits[name]) for name, form in _OPEN.items() if name in limits)]
        )
    return ", ".join(filter(None, [_KINDS[plain], _range(limits.get("ge"), limits.get("le"))]))


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f"{low:,} or more"
    return f"up to {high:,}" if low is None else f"{low:,} to {high:,}"


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its metadata, and the metadata."""
    return (kind.__origin__, kind.__metadata__) if get_origin(kind) is Annotated else (kind, ())


def _struct(kind: type[msgspec.Struct], values: Any, at: _Key, problems: list[str]) -> dict[str, Any]:
    """The fields of `kind` from `values`; what is wrong is added to `problems`."""
    if type(values) is not dict:
        problems.append(_wrong(at, values, "expected: keys and values"))
        return {}
    fields = msgspec.structs.fields(kind)
    made = {}
    for field in fields:
        key = (*at, field.encode_name)
        if field.encode_name in values:
            made[field.name] = _value(field.type, values[field.encode_name], key, problems)
        elif field.required:
            problems.append(f"{_name(key)}: is missing")
    if kind.__struct_config__.forbid_unknown_fields:
        known = {field.encode_name for field in fields}
        unknown = [key for key in values if key not in known]
        problems += [f"{_name((*at, key))}{_UNKNOWN}" for key in unknown]
    return made


def _value(kind: Any, value: Any, at: _Key, problems: list[str]) -> Any:
    """`value` as `kind`; None if something is wrong, which is added to `problems`."""
    plain, notes = _split(kind)
    before, arguments = len(problems), get_args(plain)
    if plain is Any:
        return value
    if get_origin(plain) in (Union, UnionType) and arguments[1:] == (NoneType,) and value is not None:
        return _value(arguments[0], value, at, problems)
    if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
        inner = _struct(plain, value, at, problems)
        return _made(plain, inner, at, problems) if len(problems) == before else None
    if get_origin(plain) in (list, tuple) and type(value) is list:
        value = [_value(arguments[0], one, (*at, place), problems) for place, one in enumerate(value)]
    elif get_origin(plain) is dict and type(value) is dict:
        value = {
            _value(arguments[0], name, (*at, name), problems): _value(arguments[1], one, (*at, name), problems)
            for name, one in value.items()
        }
    if len(problems) > before:
        return None
    try:
        if not _is_plain(value):
            raise msgspec.ValidationError
        made = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        problems.append(_wrong(at, value, f"expected: {takes(kind)}{_hint(plain, value)}"))
        return None
    try:
        for check in filter(callable, notes):
            made = check(made)
    except ValueError as error:
        problems.append(_wrong(at, value, str(error)))
        return None
    return made


def _made(kind: type[msgspec.Struct], values: dict[str, Any], at: _Key, problems: list[str]) -> Any:
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        problems.append(f"{_name(at)}: {error}")
        return None


def _is_plain(value: Any) -> bool:
    """Whether JSON has such a value; it has no infinity, and no half of a surrogate pair can be written as UTF-8."""
    if isinstance(value, float):
        return isfinite(value)
    if isinstance(value, str):
        return storable(value)
    return type(value) in _PLAIN


def _hint(kind: Any, value: Any) -> str:
    if kind is float and isinstance(value, str) and _is_number(value):
        return " (YAML reads 5e-5 as text: write 5.0e-5, or 0.00005)"
    if kind is float and isinstance(value, float) and not isfinite(value):
        return " (a finite number)"
    if kind is str and isinstance(value, bool):
        return ' (YAML reads yes, no, on and off as true and false: put it in "quotes")'
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _wrong(at: _Key, value: Any, takes: str) -> str:
    return f"{_name(at)}: got {_show(value)}; {takes}"


def _name(at: _Key) -> str:
    return ".".join(map(str, at)) or "(top level)"


def _show(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
