"""The labelling interface, as Label Studio's XML."""

from __future__ import annotations

import string
from collections.abc import Sequence
from xml.etree import ElementTree

from al_pipeline.errors import BadParams
from al_pipeline.integrations.label_studio.payloads import ANSWERS, COMMENT, CONTROL, data_key
from al_pipeline.params import Schema
from al_pipeline.records import shown_text

_HOTKEYS = string.digits[1:] + "0" + "".join(key for key in string.ascii_lowercase if key not in "hru")
"""Hotkeys of the classes, in order. Label Studio's editor reserves h, r and u (pan, rectangle, unselect)."""


def label_config(schema: Schema, others: Sequence[str] = (), *, review: bool = False) -> str:
    """The XML for the question, the fields as plain text, and the classes.

    `others` are further classes to offer, after the schema's. `review`: also show the answers of others, as a table
    with nothing chosen, and take a comment. Raises BadParams if a label or the question contains `$`,
    which Label Studio would replace by a field's content.
    """
    if any("$" in label for label in schema.labels) or "$" in schema.question:
        raise BadParams(
            "params.yaml: schema: question and labels must not contain `$`, which Label Studio replaces by a field"
        )
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value=shown_text(schema.question))
    for field in schema.fields:
        key = data_key(field)
        if len(schema.fields) > 1:
            ElementTree.SubElement(view, "Header", value=field.replace("$", " "), size="5")
        ElementTree.SubElement(view, "Text", name=key, value=f"${key}")
    if review:
        ElementTree.SubElement(view, "Header", value="Answers so far", size="5")
        ElementTree.SubElement(view, "Table", name="answers", value=f"${ANSWERS}")
    choices = ElementTree.SubElement(
        view,
        "Choices",
        name=CONTROL,
        toName=data_key(schema.fields[0]),
        choice="single",
        showInLine="true",
        required="true",
    )
    for position, label in enumerate(schema.labels):
        hotkey = {"hotkey": _HOTKEYS[position]} if position < len(_HOTKEYS) else {}
        ElementTree.SubElement(choices, "Choice", {"value": label, **hotkey, **_hint(schema, label)})
    for label in others:
        ElementTree.SubElement(choices, "Choice", value=label)
    if review:
        ElementTree.SubElement(
            view,
            "TextArea",
            name=COMMENT,
            toName=data_key(schema.fields[0]),
            placeholder="Comment (optional)",
            rows="2",
            maxSubmissions="1",
            editable="true",
        )
    return ElementTree.tostring(view, encoding="unicode")


def _hint(schema: Schema, label: str) -> dict[str, str]:
    """The attribute that shows a class's description when the pointer is on it; Label Studio shows it as plain text.

    A `$` becomes a blank, as in the names of fields.
    """
    meaning = schema.meanings.get(label)
    if meaning is None or not meaning.description:
        return {}
    return {"hint": shown_text(meaning.description).replace("$", " ")}
