"""Which encoding a text file is in: by its mark, else UTF-8, else a guess that is checked before it is used.

A wrong guess garbles exactly the rows with accents or another script, and nobody notices. So a guess counts only where
one encoding alone gives plausible words; where two do, the caller refuses the file and shows both.
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
"""Byte order marks and the codec that understands them; UTF-32's little-endian mark begins with UTF-16's."""

USUAL = (
    "cp1252", "cp1250", "cp1251", "iso8859-2", "iso8859-15", "cp1254", "cp1257", "cp1253", "cp1255", "cp1256", "cp874",
    "koi8-r", "koi8-u", "cp866", "iso8859-5", "mac-roman", "cp850", "cp437", "cp852", "cp932",
    "euc_jis_2004", "gb18030", "big5hkscs", "cp949",
)  # fmt: skip
"""What is tried, the more usual first: of two that give the same text the first is named."""

_MANY_BYTES = frozenset({"cp932", "euc_jis_2004", "gb18030", "big5hkscs", "cp949"})
"""Encodings in which most pairs of bytes are some character: that a few bytes can be decoded proves nothing."""
_NOT_OF_FILES = frozenset({"idna", "punycode", "undefined", "utf-7"})
"""Codecs that Python counts among the encodings, and no file is saved in."""

_MOST_ODD = 0.05
"""Share of the characters outside ASCII that may look odd in the right encoding."""
_ODDER = 0.04
"""By how much more of them, and by one at least, must look odd in every other one."""
_LESS_LIKELY = 0.8
"""Or how much less chardet must hold of it."""
_LEAST_PLACES = 10
"""Different places of characters outside ASCII, from which chardet's opinion decides where words do not."""
_LEAST_TRUST = 0.06
"""What chardet gives to a single ordinary word in the right encoding; below it, it has seen too little."""

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
"""The letters outside ASCII of languages in Latin script, with the foreign ones that their texts often have."""
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
    """What a file without a mark that is not UTF-8 may be: one encoding, or the most plausible of several."""

    encodings: tuple[str, ...]
    """The most plausible first; empty where none fits."""
    sure: bool
    """Whether the first is plausible and every other that gives another text is much less so."""


def mark(head: bytes) -> str | None:
    """The encoding that a file's first bytes name, or that the place of its NULs gives away."""
    for sign, encoding in MARKS:
        if head.startswith(sign):
            return encoding
    if b"\x1b$" in head and head.isascii():
        return "iso2022_jp_2"
    return _by_nuls(head)


def _by_nuls(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: every other byte, or three of four, of ASCII's letters is NUL."""
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
    """The name that Python gives a text encoding, as far as it knows one of that name."""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    if (
        not codec._is_text_encoding
        or codec.name in {"idna", "punycode", "undefined", "utf-7"}
        or "escape" in codec.name
    ):
        return None
    return UTF_8 if codec.name == "utf-8" else codec.name


def guess(sample: bytes) -> Guess:
    """What lines that are not UTF-8 may be in. `sample`: at most some 200,000 bytes, whole lines."""
    import chardet

    ranking = chardet.detect_all(
        sample, ignore_threshold=True, compat_names=False, prefer_superset=True, include_encodings=USUAL
    )
    trust = {str(found["encoding"]): float(found["confidence"] or 0) for found in ranking}
    texts: dict[str, str] = {}
    for encoding in USUAL:
        text = _decoded(sample, encoding)
        if text is not None and text not in texts.values():
            texts[encoding] = text
    places = {encoding: _places(text) for encoding, text in texts.items()}
    costs = {encoding: _oddness(found) for encoding, found in places.items()}
    order = sorted(texts, key=lambda e: (costs[e] - min(trust.get(e, 0.0), 0.5) / 2, USUAL.index(e)))
    if not order:
        return Guess((), False)
    best, *others = order
    count = max(1, len(places[best]))
    enough = count >= _LEAST_PLACES and trust.get(best, 0.0) >= _LEAST_TRUST
    fits = costs[best] <= _MOST_ODD and (enough or best not in _MANY_BYTES)
    sure = fits and all(
        costs[other] >= 2 * costs[best] + max(_ODDER, 1 / count)
        or (enough and trust.get(other, 0.0) <= _LESS_LIKELY * trust[best])
        for other in others
    )
    return Guess(tuple(order[:3]), sure)


def _decoded(sample: bytes, encoding: str) -> str | None:
    try:
        return sample.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _places(text: str) -> set[tuple[str, str, str]]:
    """Each character outside ASCII with its two neighbours, once: a sentence repeated a thousand times says no more."""
    return {place for place in set(zip(" " + text, text, text[1:] + " ", strict=False)) if place[1] > "\x7f"}


def _oddness(places: set[tuple[str, str, str]]) -> float:
    """The share of the characters outside ASCII that no writer would have put where they stand."""
    odd = 0
    latin: dict[str, int] = {}
    for before, character, after in places:
        if not character.isalpha():
            odd += _odd_sign(before, character, after)
        elif _odd_letter(before, character, after):
            odd += 1
        elif _script(character) == "LATIN":
            latin[character] = latin.get(character, 0) + 1
    if not places:
        return 1.0
    return (odd + min(sum(n for c, n in latin.items() if c not in alphabet) for alphabet in _ALPHABETS)) / len(places)


def _odd_sign(before: str, character: str, after: str) -> bool:
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


def _odd_letter(before: str, character: str, after: str) -> bool:
    """A letter beside one of another script or a digit, or a capital in the middle of a word."""
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
"""Forms of Hebrew and Greek letters that only end a word."""
_EAST = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO")


def _script(character: str) -> str:
    """The first word of a character's name: LATIN, CYRILLIC, CJK …"""
    name = unicodedata.name(character, "").split(" ", 1)[0]
    return "LATIN" if name in {"FEMININE", "MASCULINE", "MICRO"} else name
