"""The page that describes the interface, from its OpenAPI document; it loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font-family:ui-monospace,monospace;font-size:13px}pre{background:#f4f4f5;padding:.8rem;overflow:auto}"
    "h2{font-size:1rem;margin-top:2rem}@media(prefers-color-scheme:dark){body{background:#18181b;color:#e4e4e7}"
    "pre{background:#27272a}a{color:#93c5fd}}"
)
_EXAMPLE = """curl -s http://127.0.0.1:8000/predict -H "Authorization: Bearer $TOKEN" \\
     -H "Content-Type: application/json" -d '{"texts": ["win money now", "lunch on friday?"]}'"""


def html_page(openapi: Mapping[str, Any]) -> str:
    """The operations and types of an OpenAPI document as one HTML page."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(openapi['info']['title'])}</title>",
        f"<style>{_STYLE}</style><h1>{escape(openapi['info']['title'])}</h1>",
        "<p>Every address but <code>/v2</code>, <code>/v2/health</code> and this page needs the token. "
        'Machines read <a href="openapi.json">openapi.json</a>.</p>',
        f"<pre>{escape(_EXAMPLE)}</pre>",
    ]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}")
            asked = operation.get("requestBody")
            answer = operation["responses"].get("200", {})
            for what, found in (("takes", asked), ("answers", answer)):
                schemas = [one["schema"] for one in (found or {}).get("content", {}).values()]
                if schemas and "$ref" in schemas[0]:
                    name = schemas[0]["$ref"].rsplit("/", 1)[1]
                    parts.append(f' · {what} <a href="#{escape(name)}">{escape(name)}</a>')
            parts.append("</p>")
    for name, kind in openapi["components"]["schemas"].items():
        shown = escape(json.dumps(kind, indent=2, ensure_ascii=False))
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2><pre>{shown}</pre>')
    return "\n".join(parts)
