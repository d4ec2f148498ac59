"""Detection of a text file's encoding: by its byte order mark, else UTF-8, else a guess that is verified.

A wrong guess corrupts only the rows with accents or another script, so it goes unnoticed. A guess is therefore sure
only if a single encoding gives plausible words; if several do, the caller rejects the file and shows them.
"""

from __future__ import annotations

import codecs
import unicodedata
from dataclasses import dataclass

UTF_8 = "utf-8-sig"
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks and their codecs. UTF-32 comes first: its little-endian mark begins with that of UTF-16."""

USUAL = (
    "cp1252", "cp1250", "cp1251", "iso8859-2", "iso8859-15", "cp1254", "cp1257", "cp1253", "cp1255", "cp1256", "cp874",
    "koi8-r", "koi8-u", "cp866", "iso8859-5", "mac-roman", "cp850", "cp437", "cp852", "cp932",
    "euc_jis_2004", "gb18030", "big5hkscs", "cp949",
)  # fmt: skip
"""Candidate encodings, the most common first: if two give the same text, the first is reported."""

_MULTIBYTE = frozenset({"cp932", "euc_jis_2004", "gb18030", "big5hkscs", "cp949"})
"""Encodings in which most byte pairs are valid characters, so that successful decoding is weak evidence."""
_NOT_FOR_FILES = frozenset({"idna", "punycode", "undefined", "utf-7"})
"""Text encodings of Python in which no file is saved."""

_MAX_IMPLAUSIBLE = 0.05
"""Highest share of implausible characters, of those outside ASCII, in the right encoding."""
_IMPLAUSIBLE_MARGIN = 0.04
"""By how much that share must be higher in every other encoding (and by at least one character) ..."""
_CONFIDENCE_RATIO = 0.8
"""... unless chardet's confidence in it is at most this fraction of its confidence in the best."""
_MIN_CONTEXTS = 10
"""Number of distinct contexts (see `_contexts`) needed before chardet's confidence counts."""
_MIN_CONFIDENCE = 0.06
"""chardet's confidence for a single ordinary word in the right encoding; lower means too little evidence."""

_ALPHABETS = tuple(
    frozenset(letters + letters.upper())
    for letters in (
        "äöüßéèàç",
        "àâäçéèêëîïôöœùûüÿæ",
        "áéíóúüñªºç",
        "àáâãçéêíóôõúüªº",
        "àèéìíòóùúçïü",
        "åäöéèüà",
        "æøåéèêóòôâäöü",
        "áéíóúýþæöðå",
        "ëïéèüóöàáêâç",
        "ąćęłńóśźżé",
        "áčďéěíňóřšťúůýžäöü",
        "áäčďéíĺľňóôŕšťúýžě",
        "áéíóöőúüű",
        "čćđšžéëáö",
        "ăâîșțşţé",
        "çğıöşüâîûéİ",
        "ąčęėįšųūžé",
        "āčēģīķļņšūžõ",
        "äöüõšžé",
    )
)
"""Letters outside ASCII of languages in Latin script, with those of foreign words common in them."""
_SIGNS = frozenset(
    "“”‘’‚„–—…€£¥¢©®™°±²³¹½¼¾×÷µ§¶·•«»‹›¿¡ªº†‡‰´¨¦\u00a0\u202f№"
    "、。「」『』（）！？：；，．・ー～【】《》〈〉〜￥％＆＋／＝＊＃＠"
)
_JOINS = frozenset("’‘'-–·ー・ªº")
_OPENS = frozenset("¿¡‚„«“‘‹")
_NEVER_BEFORE_A_LETTER = frozenset("£¥¢€¤§¶±²³¹½¼¾×÷©®™»›”‡‰¦")
_CLOSES = frozenset("»›”")
_NEVER_AFTER_A_LETTER = frozenset("±¶½¼¾×÷¹¦£¥¤§¿¡„‚«‹")


@dataclass(frozen=True, slots=True)
class Guess:
    """Candidate encodings of a file that is not UTF-8 and has no byte order mark."""

    encodings: tuple[str, ...]
    """The most plausible first; empty if none fits."""
    sure: bool
    """Whether the first is plausible and every other that gives a different text is much less so."""


def by_first_bytes(head: bytes) -> str | None:
    """The encoding that a byte order mark, an escape sequence or the positions of NUL bytes reveal; else None."""
    for sign, encoding in MARKS:
        if head.startswith(sign):
            return encoding
    if b"\x1b$" in head and head.isascii():
        return "iso2022_jp_2"
    return _by_nuls(head)


def _by_nuls(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a byte order mark: in ASCII text every second byte is NUL, or three of four."""
    some = head[: len(head) // 4 * 4]
    if len(some) < 8 or b"\0" not in some[:64]:
        return None
    shares = [some[place::4].count(0) * 4 / len(some) for place in range(4)]
    for encoding, empty, full in (
        ("utf-32-le", (1, 2, 3), (0,)),
        ("utf-32-be", (0, 1, 2), (3,)),
        ("utf-16-le", (1, 3), (0, 2)),
        ("utf-16-be", (0, 2), (1, 3)),
    ):
        if all(shares[place] > 0.6 for place in empty) and all(shares[place] < 0.1 for place in full):
            return encoding
    return None


def known(name: str) -> str | None:
    """Python's name of a text encoding; None if it has none of that name, or no file is saved in it."""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    if not codec._is_text_encoding or codec.name in _NOT_FOR_FILES or "escape" in codec.name:
        return None
    return UTF_8 if codec.name == "utf-8" else codec.name


def guess(sample: bytes) -> Guess:
    """Guess the encoding of lines that are not UTF-8. `sample`: complete lines, at most about 200,000 bytes."""
    import chardet

    ranking = chardet.detect_all(
        sample, ignore_threshold=True, compat_names=False, prefer_superset=True, include_encodings=USUAL
    )
    confidence = {str(found["encoding"]): float(found["confidence"] or 0) for found in ranking}
    texts: dict[str, str] = {}
    for encoding in USUAL:
        text = _decoded(sample, encoding)
        if text is not None and text not in texts.values():
            texts[encoding] = text
    contexts = {encoding: _contexts(text) for encoding, text in texts.items()}
    costs = {encoding: _implausible_share(found) for encoding, found in contexts.items()}
    order = sorted(texts, key=lambda e: (costs[e] - min(confidence.get(e, 0.0), 0.5) / 2, USUAL.index(e)))
    if not order:
        return Guess((), False)
    best, *others = order
    count = max(1, len(contexts[best]))
    enough = count >= _MIN_CONTEXTS and confidence.get(best, 0.0) >= _MIN_CONFIDENCE
    fits = costs[best] <= _MAX_IMPLAUSIBLE and (enough or best not in _MULTIBYTE)
    sure = fits and all(
        costs[other] >= 2 * costs[best] + max(_IMPLAUSIBLE_MARGIN, 1 / count)
        or (enough and confidence.get(other, 0.0) <= _CONFIDENCE_RATIO * confidence[best])
        for other in others
    )
    return Guess(tuple(order[:3]), sure)


def _decoded(sample: bytes, encoding: str) -> str | None:
    try:
        return sample.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _contexts(text: str) -> set[tuple[str, str, str]]:
    """The distinct contexts of characters outside ASCII: each with its two neighbours. Repetition adds no evidence."""
    return {context for context in set(zip(" " + text, text, text[1:] + " ", strict=False)) if context[1] > "\x7f"}


def _implausible_share(contexts: set[tuple[str, str, str]]) -> float:
    """The share of contexts in which the character is implausible, or a Latin letter outside the best-fit alphabet."""
    implausible = 0
    latin: dict[str, int] = {}
    for before, character, after in contexts:
        if not character.isalpha():
            implausible += _implausible_sign(before, character, after)
        elif _implausible_letter(before, character, after):
            implausible += 1
        elif _script(character) == "LATIN":
            latin[character] = latin.get(character, 0) + 1
    if not contexts:
        return 1.0
    foreign = min(sum(n for c, n in latin.items() if c not in alphabet) for alphabet in _ALPHABETS)
    return (implausible + foreign) / len(contexts)


def _implausible_sign(before: str, character: str, after: str) -> bool:
    if unicodedata.combining(character) or unicodedata.category(character) in {"Mn", "Mc"}:
        return not before.isalpha() and not unicodedata.combining(before) and unicodedata.category(before)[0] != "M"
    if character not in _SIGNS:
        return True
    if character in _NEVER_BEFORE_A_LETTER - _CLOSES and after in _NEVER_BEFORE_A_LETTER - _CLOSES:
        return True
    near_letter = before.isalpha() and _script(before) not in _EAST
    if character in _NEVER_AFTER_A_LETTER and near_letter:
        return True
    if character in _NEVER_BEFORE_A_LETTER and after.isalpha() and _script(after) not in _EAST:
        return True
    if character in _OPENS and character not in _JOINS and not (after.isalnum() or after in _SIGNS):
        return True
    return near_letter and after.isalpha() and character not in _JOINS


def _implausible_letter(before: str, character: str, after: str) -> bool:
    """Whether a letter is next to another script or a digit, or is a capital in the middle of a word."""
    script = _script(character)
    if script in _EAST:
        alone = not any(_script(near) in _EAST for near in (before, after))
        return alone and (script == "HALFWIDTH" or (before.isalnum() and after.isalnum()))
    if any(near.isalpha() and _script(near) not in (script, *_EAST) for near in (before, after)):
        return True
    if before.isdigit() or after.isdigit() or (character in _FINAL and after.isalpha()):
        return True
    if character.isupper() and before.isalpha():
        return before.islower() or (before.isupper() and after.islower())
    return False


_FINAL = frozenset("ךםןףץς")
"""Final forms of Hebrew and Greek letters."""
_EAST = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO")


def _script(character: str) -> str:
    """The first word of a character's name: LATIN, CYRILLIC, CJK …"""
    name = unicodedata.name(character, "").split(" ", 1)[0]
    return "LATIN" if name in {"FEMININE", "MASCULINE", "MICRO"} else name
