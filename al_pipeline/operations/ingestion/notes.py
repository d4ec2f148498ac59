"""Messages for the user about rows with a known id and another text."""

from __future__ import annotations

from al_pipeline.data.pool import fetch
from al_pipeline.operations.ingestion.intake import ANOTHER_TEXT, MOST_COMPARED, Intake


def about_cut_off(taken: Intake) -> list[str]:
    """Report how many texts only continue the known text of their id: that one was read from an incomplete file."""
    layout = taken.workspace.layout
    folders = [layout.pool, layout.test, layout.inbox_pool, layout.inbox_test]
    known = fetch(folders, taken.other_texts) if taken.other_texts else {}
    ends = {item_id: item.text.rstrip() for item_id, item in known.items()}
    cut = sum(taken.other_texts[item_id].startswith(text) for item_id, text in ends.items())
    if not cut:
        return []
    these = "1 text with a known id continues" if cut == 1 else f"{cut:,} texts with known ids continue"
    least = "at least " if len(taken.other_texts) == MOST_COMPARED else ""
    return [f"{least}{these} the text in the pool, which was cut off: was its file read while it was being copied?"]


def about_corrections(taken: Intake) -> list[str]:
    """Explain how to accept other texts under known ids as corrections, or why no row was a correction."""
    if taken.corrections:
        if taken.had_id or not taken.rows:
            return []
        return ["no row has an id, so nothing could be corrected; --id-column names the column with your ids"]
    waiting = taken.rejected[ANOTHER_TEXT]
    if not waiting or taken.part == "test":
        return []
    texts = "1 text differs" if waiting == 1 else f"{waiting:,} texts differ"
    return [
        (
            f"{texts} from the known one with the same id; the same command with --corrections replaces the known text "
            "by the new one"
        )
    ]
