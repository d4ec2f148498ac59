"""What annotators see, as Label Studio's XML."""

from __future__ import annotations

import string
from collections.abc import Sequence
from xml.etree import ElementTree

from al_pipeline.errors import BadParams
from al_pipeline.integrations.label_studio.payloads import CONTROL, data_key
from al_pipeline.params import Schema
from al_pipeline.records import shown_text

_HOTKEYS = string.digits[1:] + "0" + "".join(key for key in string.ascii_lowercase if key not in "hru")
"""Of the classes, in their order. Label Studio's editor has h, r and u for itself (pan, rectangle, unselect)."""


def label_config(schema: Schema, others: Sequence[str] = ()) -> str:
    """The question, the fields as plain text, and the classes.

    `others` are classes behind the schema's that the page is to go on offering.
    Raises BadParams where a `$` would make Label Studio put a field's content in its place.
    """
    if any("$" in label for label in schema.labels) or "$" in schema.question:
        raise BadParams("params.yaml: schema: question and labels must not hold `$`: Label Studio puts a field there")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value=shown_text(schema.question))
    for field in schema.fields:
        key = data_key(field)
        if len(schema.fields) > 1:
            ElementTree.SubElement(view, "Header", value=field.replace("$", " "), size="5")
        ElementTree.SubElement(view, "Text", name=key, value=f"${key}")
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
        ElementTree.SubElement(choices, "Choice", {"value": label, **hotkey})
    for label in others:
        ElementTree.SubElement(choices, "Choice", value=label)
    return ElementTree.tostring(view, encoding="unicode")
