"""deploy/compose.yaml as Docker Compose reads it: with its variables replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-+])([^}]*))?\}")


def compose(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file's content where the environment holds `variables` and no others."""
    given = variables or {}

    def value(found: re.Match[str]) -> str:
        name, operator, other = found.groups()
        known = given.get(name, "")
        return (other if known else "") if operator == "+" else known or other or ""

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: replaced(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [replaced(inner) for inner in part]
        return _VARIABLE.sub(value, part) if isinstance(part, str) else part

    content: dict[str, Any] = replaced(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    return content
