"""Create a workspace: a git and DVC repository that holds one labelling project."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from al_pipeline.errors import BadInput, RepositoryError
from al_pipeline.files import (
    TEMPORARY_PREFIX,
    make_folder,
    read_object,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)
from al_pipeline.integrations.dvc.remotes import check_address
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checkout import git_files
from al_pipeline.params import parse_params
from al_pipeline.sanitize import JOINERS, has_password
from al_pipeline.workspace.home import private_folder, restrict_umask
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import LAYOUT_VERSION, Workspace, open_workspace


def init(
    folder: Path,
    labels: Sequence[str],
    question: str | None = None,
    remote: str | None = None,
    test_size: int | None = None,
) -> Workspace:
    """Create a workspace in `folder`, which must be new or empty, and commit it.

    `remote` is the DVC remote's address (default: a folder in `al`'s home, on this machine); `test_size` is the number
    of items that the first ingest sets aside as the test set. A failed call leaves nothing behind; after a kill, the
    same call finishes the job. Raises BadInput if `folder` holds something else or lies in a workspace or in a git
    repository that does not ignore it, or if DVC cannot store a path or use the remote on this machine; BadParams if
    the labels are invalid.
    """
    if remote is not None and has_password(remote):
        raise BadInput(
            "the address of the DVC remote contains a password, which git would keep for ever: give it without the "
            "password, and set that inside the new workspace with `dvc remote modify --local store password …`"
        )
    if remote is not None:
        check_address(remote)
    folder = folder.resolve()
    layout = Layout(folder)
    _refuse_inside(folder)
    text = with_schema(template("params.yaml"), labels, question, test_size)
    parse_params(text, "the schema")
    if layout.marker.exists():
        _refuse_begun(layout)
    elif folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose a new folder")
    elif folder.exists() and not all(_is_ours(entry.name) for entry in folder.iterdir()):
        raise BadInput(f"{folder} is not empty; choose a new folder")
    elif (folder / ".git").exists() and Git(folder).head() is not None and Git(folder).modes("HEAD"):
        raise BadInput(f"{folder} is a git repository whose last commit contains files; choose a new folder")
    umask = restrict_umask()
    try:
        with _all_or_nothing(folder):
            return _make(layout, text, remote)
    finally:
        os.umask(umask)


def _make(layout: Layout, params: str, remote: str | None) -> Workspace:
    folder = layout.root
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not layout.marker.exists():
        write_json(layout.marker, {"layout": LAYOUT_VERSION, "workspace_id": uuid.uuid4().hex[:12]})
    workspace = open_workspace(folder)
    homes = [place for place in (workspace.home, *workspace.home.parents) if not place.exists()]
    try:
        write_text(layout.params, params)
        write_text(layout.dvc_yaml, template("dvc.yaml"))
        for path, lines in git_files(layout, "", "").items():
            write_text(path, lines)
        write_json(layout.project, {})
        workspace.make_home()
        git = Git(folder)
        git.init()
        with Dvc(folder, layout.dvc_process, layout.logs / "dvc.log") as dvc:
            dvc.init(remote or str(workspace.home / "dvc-remote"))
        make_folder(layout.inbox.parent)
        private_folder(layout.inbox)
        _ = workspace.clone_id
        names = (".gitignore", ".gitattributes", ".dvcignore", ".dvc")
        ours = [layout.marker, layout.params, layout.dvc_yaml, layout.rounds, *(folder / name for name in names)]
        git.commit("Make the workspace", ours)
    except BaseException:
        if homes:
            shutil.rmtree(workspace.home, ignore_errors=True)
        for place in homes:
            with contextlib.suppress(OSError):
                place.rmdir()
        raise
    return workspace


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """If the block fails, remove what it created in `folder` and the parent folders that it created; keep the rest.

    A folder left by a killed call is completed by the next one or, if that fails, left as it was found.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    repository = folder / ".git"
    before = {path: path.read_bytes() if path.name in ("index", "HEAD") else None for path in _tree(repository)}
    entries = set() if made else {path.name for path in folder.iterdir()}
    head = _head(folder)
    try:
        yield
    except BaseException:
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
        try:
            if _head(folder) == head:  # else the commit was made, and the workspace is complete
                _take_away(folder, entries, before, made)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
        raise


def _take_away(folder: Path, entries: set[str], repository: Mapping[Path, bytes | None], made: Sequence[Path]) -> None:
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.name in entries:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if repository:  # it existed before: remove the files that were added, restore those that it held
        for path in sorted(_tree(folder / ".git") - set(repository), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path, content in repository.items():
            if content is not None and path.read_bytes() != content:
                write_bytes(path, content)
    for place in made:
        with contextlib.suppress(OSError):
            place.rmdir()


def _tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*")) if folder.is_dir() else set()


def _head(folder: Path) -> str | None:
    """The HEAD commit of a repository in `folder` itself; without the check git would search the parent folders."""
    try:
        return Git(folder).head() if (folder / ".git").exists() else None
    except RepositoryError:
        return None


def _refuse_begun(layout: Layout) -> None:
    """Raise BadInput unless the workspace is what a killed `init` leaves: no commit, and only files that it writes.

    Raises RepositoryError if git cannot tell whether there is a commit.
    """
    folder = layout.root
    if (folder / ".git").exists() and Git(folder).head() is not None:
        raise BadInput(f"{folder} is already a workspace; work inside it, or choose another folder")
    work = (layout.dvc_lock, layout.engine, layout.closing, layout.genesis, layout.interventions, *layout.sources)
    answers = (
        layout.inbox_pool,
        layout.inbox_test,
        layout.inbox_events,
        layout.round(0),
        layout.logs.parent / "rounds",
    )
    if (found := next((path for path in (*work, *answers) if path.exists()), None)) or read_object(layout.project):
        raise BadInput(
            f"{folder} is a workspace with work in it ({(found or layout.project).relative_to(folder)}), but without "
            "its git history: restore `.git` from a copy or a clone, or choose another folder"
        )


def _refuse_inside(folder: Path) -> None:
    """Raise BadInput if `folder` lies in a workspace, or in a repository that would track it as files or a submodule.

    A repository that ignores the folder is accepted, so that a workspace can lie in a monorepo.
    """
    for outer in folder.parents:
        if Layout(outer).marker.exists():
            raise BadInput(f"{folder} is inside the workspace {outer}; choose a folder outside it")
        if (outer / ".git").exists():
            inner = f"{folder.relative_to(outer).as_posix()}/"
            magic = {"GIT_LITERAL_PATHSPECS": "0"}  # check-ignore does not support literal pathspecs, nor patterns
            ask = ("check-ignore", "--quiet", "--no-index", "--", f"./{inner}")
            if Git(outer).run(*ask, check=False, more=magic).returncode == 0:
                continue
            raise BadInput(
                f"{folder} is inside the git repository {outer}, but a workspace is a repository of its own: choose a "
                f"folder outside it, or add the line /{inner} to {outer / '.gitignore'} and try again"
            )


def _is_ours(name: str) -> bool:
    """Whether an otherwise empty folder may hold `name`: a git repository, or what a killed call left."""
    return name == ".git" or name.startswith(TEMPORARY_PREFIX)


def with_schema(text: str, labels: Sequence[str], question: str | None, test_size: int | None = None) -> str:
    """The template with the given labels and, if given, question and test set size; comments are preserved."""
    from ruamel.yaml import YAML  # lazy: takes 25 ms, and no other command needs it
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString as Quoted

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, sys.maxsize
    yaml.indent(mapping=2, sequence=4, offset=2)
    values = yaml.load(text)
    values["schema"]["labels"] = list(map(Quoted, labels))
    if question is not None:
        values["schema"]["question"] = Quoted(question)
    if test_size is not None:
        values["ingest"]["test_size"] = test_size
    out = io.StringIO()
    yaml.dump(values, out)
    return "".join(map(_escaped, out.getvalue()))


def _escaped(character: str) -> str:
    """The character, escaped for a double-quoted string if it would reverse, break or hide the text after it."""
    joins = character in JOINERS or "\U000e0020" <= character <= "\U000e007f"
    if character.isprintable() or character == "\n" or joins:
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"
