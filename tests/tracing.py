"""System calls of a process and of all its children, recorded by strace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from al_pipeline.integrations import forks

FILES = (
    *("open", "openat", "creat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "execve", "connect"),
)
WRITES = (
    *("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range", "ioctl", "truncate", "ftruncate"),
    *("fsync", "fdatasync"),
)

_LINE = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>)?(.*)\Z", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(?:<(.*?)>)?(?: .*)?\Z", re.DOTALL)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_FOLDER = re.compile(r"(?:AT_FDCWD|\d+)<(/[^>]*)>")
_OPEN_FILE = re.compile(r"\d+<(/[^>]*)>")


@dataclass(frozen=True, slots=True)
class Call:
    """One system call."""

    name: str
    paths: tuple[str, ...]
    """Absolute paths: those that it names, or of the open files passed to it, in order; for `open`, the opened file."""
    words: str
    """Its arguments as strace writes them."""
    failed: bool = False


def trace(
    command: Sequence[str], log: Path, calls: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `command` and write its calls of the kinds `calls` to `log`. Skips the test if strace cannot do that."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-f", "-o", os.devnull, "true"], capture_output=True).returncode:
        pytest.skip("!! NOT TESTED: strace is not installed, or may not trace here")
    options = ["-f", "--seccomp-bpf", "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(calls)}"]
    options += ["-e", "signal=none"]
    if not {"open", "openat"} <= set(calls):
        raise ValueError("folders are known from what is opened in them")
    environment = dict(os.environ if environment is None else environment)
    environment.pop(forks.FOLDER, None)  # what a fork server does is not traced
    return subprocess.run(
        [strace, *options, "--", *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def read_calls(log: Path, *, failed: bool = False) -> Iterator[Call]:
    """The calls in the order in which they ended; with failed calls if requested."""
    begun: dict[str, str] = {}
    where: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if not (found := _LINE.match(line)):
            continue
        process, resumed, text = found.groups()
        if text.endswith(" <unfinished ...>"):
            begun[process] = text.removesuffix(" <unfinished ...>")
            continue
        if resumed:
            text = begun.pop(process, "") + text
        if not (call := _CALL.match(text)) or call[3] == "?" or (call[3] == "-1" and not failed):
            continue
        name, words, code, opened = call.groups()
        if "AT_FDCWD<" in words:
            where[process] = words.split("AT_FDCWD<", 1)[1].split(">", 1)[0]
        yield Call(name, tuple(_paths(name, words, opened, where.get(process, "/"))), words, code == "-1")


def _paths(name: str, words: str, opened: str | None, folder: str) -> Iterator[str]:
    if opened and opened.startswith("/"):
        yield opened
    elif name in FILES and name != "connect":
        rest = words
        for quoted in _QUOTED.finditer(words):
            before = rest[: quoted.start() - (len(words) - len(rest))]
            given = _FOLDER.search(before)
            yield os.path.normpath(os.path.join(given[1] if given else folder, quoted[1]))
            rest = words[quoted.end() :]
    else:
        yield from _OPEN_FILE.findall(words)
