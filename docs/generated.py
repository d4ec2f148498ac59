"""The parts of the reference that are made from the code, as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer
import yaml

from al_pipeline import errors, frames
from al_pipeline.active_learning.acquisition import ACQUISITION, SAMPLE_ACQUISITION
from al_pipeline.active_learning.strategies import STRATEGIES
from al_pipeline.cli.app import app
from al_pipeline.params import Params
from al_pipeline.validation import takes

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- generated: (\w+) -->")


def fill(text: str) -> str:
    """The page with its generated parts in place of their marks. Raises KeyError on a mark that means nothing."""
    return _MARK.sub(lambda mark: PARTS[mark[1]](), text)


def walk(command: Any = None, name: str = "al") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups before what is in them."""
    command = typer.main.get_command(app) if command is None else command
    yield name, command
    for inner, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from walk(child, f"{name} {inner}")


def commands() -> str:
    """A section for each command, in the groups of `al --help`."""
    found = dict(walk())
    root = found.pop("al")
    panels: dict[str, list[str]] = {}
    for name in found:
        top = root.commands[name.split()[1]]
        panels.setdefault(top.rich_help_panel, []).append(name)
    lines = ["## al", "", _prose(root.help), "", *_parameters(root)]
    for panel, names in panels.items():
        lines += ["", f"## {panel}"]
        for name in names:
            lines += ["", f"### {name}", "", f"`{_usage(name, found[name])}`", "", _prose(found[name].help), ""]
            lines += _parameters(found[name])
    return "\n".join(lines)


def _usage(name: str, command: Any) -> str:
    words = [name]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = (parameter.metavar or parameter.name.upper()) + ("..." if parameter.nargs == -1 else "")
            words.append(word if parameter.required else f"[{word}]")
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {_metavar(parameter)}")
    return " ".join([*words, "[OPTIONS]"] + (["COMMAND"] if getattr(command, "commands", None) else []))


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper().replace("_", "-")


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            spelling = f"`{_metavar(parameter)}`"
        else:
            spelling = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        help_text = " ".join((parameter.help or "").split())
        given = parameter.default
        if given not in (None, False, "", True) and "Default" not in help_text and not callable(given):
            help_text += f" Default: {given}."
        rows.append(f"| {spelling} | {_cell(help_text)}{' **Required.**' if parameter.required else ''} |")
    return ["| | |", "|---|---|", *rows] if rows else []


def _prose(text: str | None) -> str:
    """Help as Markdown: what is bold on a terminal is a command."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))
    return "\n\n".join(_escape(re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", paragraph)) for paragraph in paragraphs)


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


def _escape(text: str) -> str:
    """Characters that Markdown would take for itself, outside code."""
    parts = text.split("`")
    return "`".join(re.sub(r"([\\*_<>\[\]])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def parameters() -> str:
    """A table for each section of params.yaml: the template's value, what a key takes, and the template's comment."""
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    lines: list[str] = []
    _section(Params, yaml.safe_load(text), _comments(text), (), lines)
    return "\n".join(lines)


def _section(
    model: type[msgspec.Struct], values: Any, notes: dict[str, str], at: tuple[str, ...], lines: list[str]
) -> None:
    inner = []
    if at:
        lines += ["", f"## {'.'.join(at)}", "", _prose(inspect.getdoc(model))]
    lines += ["", "| key | in the template | takes | |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(model):
        key, kind = field.encode_name, field.type
        if key not in values:  # `schema.meanings`, which the file has in `schema.labels`
            continue
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            inner.append((kind, key))
            continue
        path, taken = ".".join((*at, key)), takes(kind, "`{}`".format)
        lines.append(f"| `{path}` | `{_value(values[key])}` | {_cell(taken)} | {_cell(notes.get(path, ''))} |")
    for kind, key in inner:
        _section(kind, values[key], notes, (*at, key), lines)


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).strip()
    return text.removesuffix("...").strip().replace("''", '""')


def _comments(text: str) -> dict[str, str]:
    """The comment beside each key of params.yaml, by the key's path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := re.match(r"( *)([a-z_]+):(?:.*?)(?:\s#\s*(.*))?$", line):
            depth = len(match[1])
            path = [*(step for step in path if step[0] < depth), (depth, match[2])]
            if match[3]:
                found[".".join(name for _, name in path)] = match[3]
    return found


def strategies() -> str:
    """Every query strategy: what scores for it, what it needs, and the paper that it follows."""
    scores = ACQUISITION | SAMPLE_ACQUISITION
    lines = []
    for name, strategy in STRATEGIES.items():
        needs = sorted(_NEEDS[need] for need in strategy.needs if need in _NEEDS)
        needs += [_SAMPLES[strategy.samples]] if strategy.samples else []
        said = inspect.getdoc(strategy.pick), inspect.getdoc(scores.get(strategy.acquisition or ""))
        told = [text for text in said if text and (strategy.pick.__name__ != "_pick_top" or text == said[1])]
        if name == "random":
            told = ["Uniform random sampling of the unlabelled items."]
        lines += [f"### {name}", "", *(f"{_prose(text)}\n" for text in told[:1] + told[1:] * (name == "power_bald"))]
        uses = ([f"scores by `{strategy.acquisition}`"] if strategy.acquisition else []) + (
            [f"needs {' and '.join(needs)}"] if needs else []
        )
        lines += [f"{', '.join(uses).capitalize()}.\n"] if uses else []
    return "\n".join(lines)


_NEEDS = {
    "vectors": "the encoder's vectors",
    "labeled": "the vectors of the labelled items",
    "counts": "the number of labels of each class",
    "centre": "the mean vector of the pool",
}
_SAMPLES = {"committee": "a committee of models", "posterior": "samples of the posterior"}


def exit_codes() -> str:
    """The tree of errors, with the exit code of each."""
    lines = ["| exit code | error | when |", "|---|---|---|"]

    def add(error: type[errors.AlError]) -> None:
        said = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
        lines.append(f"| {error.exit_code} | `{error.__name__}` | {_cell(said)} |")
        for child in error.__subclasses__():
            if child.__module__ == errors.__name__:
                add(child)

    for error in sorted(errors.AlError.__subclasses__(), key=lambda found: found.exit_code):
        if error.__module__ == errors.__name__:
            add(error)
    return "\n".join(lines)


def python() -> str:
    """The public functions of `al_pipeline.frames`, from their docstrings."""
    names = [n for n, f in inspect.getmembers(frames, inspect.isfunction) if f.__module__ == frames.__name__]
    return "\n".join(
        f"```{{eval-rst}}\n.. autofunction:: al_pipeline.frames.{n}\n```\n" for n in names if not n.startswith("_")
    )


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "parameters": parameters,
    "strategies": strategies,
    "exit_codes": exit_codes,
    "python": python,
}
