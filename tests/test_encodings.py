"""Files that are not UTF-8: read right, or refused as a whole with the command that works. Never read wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from al_pipeline.data.encodings import by_first_bytes, guess, known
from al_pipeline.data.inputs import Source
from al_pipeline.data.table_rows import BadRow, Row
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput

PROSE = {
    "Le café était fermé. L'été dernier à Noël, où êtes-vous allés ? C'est déjà très tard.": (
        "cp1252", "latin-1", "iso8859-15", "mac_roman",
    ),
    "Grüße aus München, schöne Straße. Übermorgen wäre gut; das Gerät läuft nicht mehr.": (
        "cp1252", "latin-1", "cp1250", "cp850", "mac_roman",
    ),
    "¿Cuándo llegará mi pedido? El año pasado compré un niño de peluche, gracias señor.": ("cp1252", "mac_roman"),
    "Jag har inte fått min beställning ännu, kan ni hjälpa mig? Tack så mycket på förhand.": ("cp1252",),
    "Zażółć gęślą jaźń. Proszę o zwrot pieniędzy, ponieważ przesyłka została uszkodzona.": ("cp1250", "iso8859-2"),
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Dobrý den, potřeboval bych vrátit zboží.": ("cp1250", "iso8859-2"),
    "Árvíztűrő tükörfúrógép. Köszönöm szépen a segítséget, várom válaszukat.": ("cp1250",),
    "Siparişim hâlâ gelmedi, lütfen yardımcı olur musunuz? Teşekkürler, iyi günler.": ("cp1254",),
    "Здравствуйте, я хочу вернуть товар. Почему мой заказ до сих пор не доставлен?": (
        "koi8-r", "cp1251", "cp866", "iso8859-5",
    ),
    "Καλημέρα, η παραγγελία μου δεν έχει φτάσει ακόμα. Ευχαριστώ πολύ.": ("cp1253",),
    "שלום, ההזמנה שלי עדיין לא הגיעה. תודה רבה על העזרה": ("cp1255",),
    "مرحبا، لم يصل طلبي بعد. شكرا جزيلا على المساعدة": ("cp1256",),
    "こんにちは。注文した商品がまだ届いていません。返金をお願いします。": ("shift_jis", "euc_jp"),
    "您好，我的订单还没有收到，请帮我退款。谢谢您的帮助，祝您生活愉快。": ("gb18030", "gbk"),
    "您好，我的訂單還沒有收到，請幫我退款。謝謝您的幫助。": ("big5",),
    "안녕하세요. 주문한 상품이 아직 도착하지 않았습니다. 환불해 주세요.": ("euc_kr",),
}  # fmt: skip

SCRAPS = {
    "Müller called about José's order": ("cp1252", "mac_roman", "cp850"),
    "Costs £5": ("cp1252", "cp850"),
    "It’s 5 € – “ok”": ("cp1252", "mac_roman"),
    "20°C outside": ("cp1252", "mac_roman", "cp850"),
    "© 2024 Foo™": ("cp1252", "mac_roman"),
    "naïve": ("cp1252",),
    "Łódź office": ("cp1250", "iso8859-2"),
    "Dvořák plays": ("cp1250", "iso8859-2"),
    "señor García": ("cp1252", "mac_roman", "cp437"),
    "это": ("cp1251", "koi8-r", "cp866"),
    "ВНИМАНИЕ АКЦИЯ": ("cp1251", "koi8-r", "cp866"),
    "Ελλάδα": ("cp1253",),
    "İstanbul ığdır": ("cp1254",),
    "日本": ("cp932", "euc_jp"),
    "北京 office": ("gb18030", "big5", "cp932"),
    "서울": ("cp949",),
    "ｶﾀｶﾅ 半角": ("cp932",),
    "10 µm ± 2, ½ cup, ×3 §4": ("cp1252",),
}


def write(path: Path, encoding: str, texts: list[str]) -> Path:
    path.write_bytes(
        "".join(f"{line}\n" for line in ["id,text", *(f'{n},"{t}"' for n, t in enumerate(texts))]).encode(encoding)
    )
    return path


def read(path: Path, encoding: str | None = None) -> tuple[list[Row | BadRow], list[str]]:
    notes: list[str] = []
    source = Source(path, encoding=encoding)
    return [row for batch in read_table(source, ["text"], on_note=notes.append) for row in batch], notes


def texts(rows: list[Row | BadRow]) -> list[str]:
    return [row.values["text"] if isinstance(row, Row) else row.reason for row in rows]


@pytest.mark.parametrize(("text", "encoding"), [(text, name) for text, names in PROSE.items() for name in names])
@pytest.mark.parametrize("every", [1, 50])
def test_what_people_write_is_read_as_they_wrote_it(tmp_path: Path, text: str, encoding: str, every: int) -> None:
    """Whether all rows are in it, or one in fifty among English ones."""
    wanted = [text if n % every == 0 else "nothing but English words in this row" for n in range(200)]
    rows, notes = read(write(tmp_path / "a.csv", encoding, wanted))
    assert texts(rows) == wanted
    assert "is not UTF-8; read as" in notes[0]
    assert "`--encoding` chooses another" in notes[0]


@pytest.mark.parametrize(("text", "encoding"), [(text, name) for text, names in SCRAPS.items() for name in names])
@pytest.mark.parametrize("count", [1, 30])
def test_a_scrap_is_read_right_or_the_file_is_refused(tmp_path: Path, text: str, encoding: str, count: int) -> None:
    wanted = [*["nothing but English words here"] * 400, *[f"some words, {text}"] * count]
    path = write(tmp_path / "a.csv", encoding, wanted)
    try:
        rows, _ = read(path)
    except BadInput as refusal:
        assert "leaving them out would bias the data, so no row was used" in str(refusal)
        assert "--encoding" in str(refusal)
    else:
        assert texts(rows) == wanted
    assert texts(read(path, encoding)[0]) == wanted, "the encoding that the user names is taken"


def test_a_file_is_refused_before_any_row_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    junk = bytes(range(128, 256))
    path.write_bytes(b'{"text": "plain"}\n' * 3000 + b'{"text": "' + (junk + b'"}\n{"text": "') * 3 + junk + b'"}\n')
    with pytest.raises(BadInput, match="4 of 3,004 rows are not valid UTF-8, the first in line 3,001"):
        next(read_table(path, ["text"]))


def test_one_row_in_a_thousand_may_drop_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    accented = '{"text": "grün"}\n'.encode()
    path.write_bytes(accented * 1998 + b'{"text": "caf\xe9"}\n' * 2)
    rows, _ = read(path)
    assert sum(isinstance(row, BadRow) for row in rows) == 2
    path.write_bytes(accented * 1997 + b'{"text": "caf\xe9"}\n' * 2)
    with pytest.raises(BadInput, match="2 of 1,999 rows"):
        read(path)


def test_a_file_that_is_utf_8_for_its_first_part_mixes_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + "Grüße vom Café\n".encode() * 990 + "Grüße vom Café\n".encode("cp1252") * 10)
    with pytest.raises(
        BadInput, match=r"10 of 1,000 rows .* line 992.*mixes two encodings.*`--encoding utf-8\+cp1252`"
    ):
        read(path)
    rows, _ = read(path, "utf-8+cp1252")
    assert texts(rows) == ["Grüße vom Café"] * 1000


def test_the_wrong_encoding_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "cp1252", ["Le café était fermé, où êtes-vous ?"] * 100)
    with pytest.raises(BadInput, match="100 of 100 rows are not valid UTF-8.*`--encoding cp1252`: “.*café"):
        read(path, "utf-8-sig")
    with pytest.raises(BadInput, match="rows are not valid ascii"):
        read(path, "ascii")


def test_nul_bytes_do_not_make_it_utf_16(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + b"a\0b\0\0\0\0\0c grey\n" * 10)
    assert texts(read(path)[0]) == ["a\0b\0\0\0\0\0c grey"] * 10


def test_bytes_that_are_no_text_at_all_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + bytes(range(256)) * 40)
    with pytest.raises(BadInput, match="no row was used"):
        read(path)


def test_seven_bits_can_be_japanese(tmp_path: Path) -> None:
    wanted = ["こんにちは。返金をお願いします"] * 20
    rows, _ = read(write(tmp_path / "a.csv", "iso2022_jp", wanted))
    assert texts(rows) == wanted


def test_names_of_encodings() -> None:
    assert [known(name) for name in ("UTF8", "latin1", "Windows-1252", "SJIS")] == [
        "utf-8-sig", "iso8859-1", "cp1252", "shift_jis",
    ]  # fmt: skip
    for name in (
        "nope",
        "rot13",
        "hex",
        "zip",
        "unicode_escape",
        "raw_unicode_escape",
        "idna",
        "utf-7",
        "undefined",
        "",
    ):
        assert known(name) is None
    assert by_first_bytes(b"") is None
    assert guess(b"\xff").sure is False
