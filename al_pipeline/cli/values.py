"""Values of options and arguments: texts and paths without pydantic, whose import would be a fifth of `al status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import core
from typer._coercion import RuntimeParam, TypeDescriptor, build_runtime_param
from typer._param_types import coerce_cli_path


class _Converter(RuntimeParam):
    def _coerce_value(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str) and self.parameter_info.parser is None:
            if self.annotation is str:
                return value
            if self.annotation is Path:
                return coerce_cli_path(Path(value), self.parameter_info, path_type=Path, param=param, ctx=ctx)
        return build_runtime_param(param.type_descriptor)._coerce_value(value, param=param, ctx=ctx)


def convert_plain_values() -> None:
    """Let typer pass on texts and paths as they are. It converts all other values as before."""
    core.build_runtime_param = _converter  # type: ignore[attr-defined]


def _converter(descriptor: TypeDescriptor) -> RuntimeParam:
    return _Converter(descriptor.parameter_info, descriptor.annotation)
