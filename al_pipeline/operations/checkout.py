"""All checks of the git repository before anything is decided, staged or committed, and migrations of its files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path

from al_pipeline.errors import ManualActionRequired
from al_pipeline.files import write_bytes, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.records import round_name
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import odd_setting

_logger = get_logger(__name__)

ROUND_TAGS = "round-*"

_SECTION = re.compile(r"\s*\[")
_REMOTE = re.compile(r"""\s*\[\s*['"]?\s*remote\s""")
_VERIFY = re.compile(r"\s*verify\s*=")


def check_ready(layout: Layout, git: Git) -> None:
    """Raise ManualActionRequired, with a fix, unless HEAD is a branch with complete history and nobody works on it.

    That is: no merge, rebase or similar is in progress, no conflict is unresolved, the clone is complete, and every
    round's tag is in the branch's history. Raises RepositoryError if git cannot tell.
    """
    if git.head() is None:
        raise ManualActionRequired(f"{layout.root} has no commit; was `al init` interrupted? Run it again")
    git.check_idle()
    git.check_complete(layout.tracked)
    if outside := [name for name in git.unmerged_tags(ROUND_TAGS) if _is_round(name)]:
        name, branch = max(outside), git.branch()
        has = git.show("HEAD", Layout().record(int(name.removeprefix("round-"))).as_posix()) is not None
        why, way = (
            ("the branch was rebased or amended after it was published", f"`git merge -s ours {name}` joins the two")
            if has
            else (
                "an older state or another branch is checked out",
                f"`git merge {name}` and `dvc pull` bring it here",
            )
        )
        raise ManualActionRequired(f"{name} is not in the history of {branch}: {why}. {way}, then try again")


def check_not_ignored(layout: Layout, git: Git) -> None:
    """Raise ManualActionRequired, naming the line, if git ignores a file that DVC reads: DVC refuses ignored files.

    The engine's lines in `.gitignore` override the user's rules elsewhere, but a later line overrides them.
    """
    for name, line in git.ignored(layout.of_dvc).items():
        raise ManualActionRequired(
            f"git ignores {name}, which DVC then cannot track. The line that ignores it is `{line}`: remove or narrow "
            "it, then try again"
        )


def check_tags(rounds: Collection[int], tags: Iterable[str]) -> None:
    """Raise ManualActionRequired if a tag is named after an unpublished round, which could then never be tagged."""
    known = {round_name(number) for number in rounds}
    if strange := sorted(name for name in tags if _is_round(name) and name not in known):
        raise ManualActionRequired(
            f"the tag {strange[0]} names a commit that does not contain that round, and the round will need the tag: "
            f"`git tag -d {strange[0]}` (`git show {strange[0]}` shows who made it), then try again"
        )


def put_back_converted(layout: Layout, git: Git, changed: Iterable[str] | None = None) -> list[str]:
    """Restore the committed bytes of files whose line endings git converted on checkout (`core.autocrlf`).

    These files differ in nothing else, so no edit is lost. Returns their names. Call only while holding the lock.
    `changed`: the tracked files of the engine that differ from HEAD, if they are known.
    """
    if not (found := converted(layout, git, git.changed(layout.tracked) if changed is None else changed)):
        return []
    found = converted(layout, git, [*found, *git.tracked(layout.tracked)])
    for name in found:
        stored = git.blob("HEAD", name)
        assert stored is not None
        write_bytes(layout.root / name, stored)
    git.refresh(found)
    _logger.warning("git had converted line endings, which were restored: %s", ", ".join(found))
    return found


def converted(layout: Layout, git: Git, changed: Iterable[str] = ()) -> list[str]:
    """The files of `changed`, and of those that a build reads, that differ from HEAD in line endings alone."""
    found = []
    read = (path.relative_to(layout.root).as_posix() for path in layout.steering)
    for name in sorted({*changed, *read}):
        path = layout.root / name
        if path.is_file() and b"\r\n" in (text := path.read_bytes()):
            stored = git.blob("HEAD", name)
            if stored is not None and stored != text and stored == text.replace(b"\r\n", b"\n"):
                found.append(name)
    return found


def git_files(layout: Layout, ignore: str, attributes: str) -> dict[Path, str]:
    """The contents of `.gitignore` and `.gitattributes` with the engine's lines added; the user's lines stay."""
    return {
        layout.git_ignore: with_lines(ignore, (*layout.not_ignored, *layout.ignored)),
        layout.git_attributes: with_lines(attributes, layout.attributes),
    }


def keep_bytes(layout: Layout, git: Git) -> list[str]:
    """Migrate an older workspace so that git neither converts nor ignores the engine's files. Idempotent.

    Commits the files it changed and returns their names; does nothing if one of them has uncommitted edits.
    """
    texts = git.read("HEAD", [".gitignore", ".gitattributes"])
    wanted = git_files(layout, texts.get(".gitignore", ""), texts.get(".gitattributes", ""))
    stale = {path: text for path, text in wanted.items() if text != texts.get(path.name, "")}
    for path, text in stale.items():
        here = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
        if here not in (texts.get(path.name, ""), text):
            return []
    for path, text in stale.items():
        write_text(path, text)
    if stale:
        git.commit("Have git neither convert nor ignore the engine's files", stale)
    return sorted(path.name for path in stale)


def bring_in_line(layout: Layout, git: Git) -> list[str]:
    """Migrate the tracked configuration files of an older workspace. Idempotent.

    Commits the files it changed and returns their names; skips files with uncommitted edits.
    """
    return sorted([*keep_bytes(layout, git), *keep_verified(layout, git)])


def keep_verified(layout: Layout, git: Git) -> list[str]:
    """Have manual `dvc` commands verify what they fetch, in this and every later clone. `al` itself always does."""
    config = layout.root / ".dvc/config"
    text = git.show("HEAD", ".dvc/config") or ""
    wanted = with_verification(text)
    if wanted == text or odd_setting(text):  # leave a file accepted by `al trust` unchanged
        return []
    if config.read_bytes() not in (text.encode(), wanted.encode()):
        return []
    write_text(config, wanted)
    git.commit("Have DVC compare what it fetches with the digest that was asked for", [config])
    return [".dvc/config"]


def with_verification(text: str) -> str:
    """DVC's configuration with `verify` enabled for each remote that does not set it."""
    lines = text.splitlines()
    places = [place for place, line in enumerate(lines) if _SECTION.match(line)]
    for begin, end in reversed([*pairwise([*places, len(lines)])]):
        if _REMOTE.match(lines[begin]) and not any(_VERIFY.match(line) for line in lines[begin:end]):
            lines.insert(begin + 1, "    verify = true")
    return "".join(f"{line}\n" for line in lines)


def with_lines(text: str, lines: tuple[str, ...]) -> str:
    """`text` with the missing ones of `lines` appended; the user's lines stay."""
    missing = [line for line in lines if line not in text.splitlines()]
    return "".join(f"{line}\n" for line in [*text.splitlines(), *missing]) if missing else text


def _is_round(name: str) -> bool:
    number = name.removeprefix("round-")
    return name.startswith("round-") and number.isascii() and number.isdigit() and round_name(int(number)) == name
