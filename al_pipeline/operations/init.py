"""Make a workspace: a git and DVC repository that holds one labelling project."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path

from al_pipeline.errors import BadInput
from al_pipeline.files import TEMPORARY_PREFIX, remove_leftovers, write_json, write_text
from al_pipeline.layout import Layout
from al_pipeline.params import parse_params
from al_pipeline.plain import has_password
from al_pipeline.repository import Dvc, Git
from al_pipeline.trust import template
from al_pipeline.workspace import LAYOUT_VERSION, Workspace, open_workspace


def init(
    folder: Path,
    labels: Sequence[str],
    question: str | None = None,
    remote: str | None = None,
    test_size: int | None = None,
) -> Workspace:
    """Make a workspace in `folder`, which must be new or empty, and commit it.

    `remote` is a DVC remote's address (default: a folder in `al`'s home, on this machine); `test_size` how many items
    the first ingest sets aside as the test set. Killed half-way, the same
    call finishes the job. Raises BadInput where `folder` holds something else, BadParams where labels are no good.
    """
    if remote is not None and has_password(remote):
        raise BadInput(
            "the address of the DVC remote holds a password, which git would keep for ever: give it without, and the "
            "password by `dvc remote modify --local store password …` inside the new workspace"
        )
    folder = folder.resolve()
    layout = Layout(folder)
    text = with_schema(template("params.yaml"), labels, question)
    if test_size is not None:
        text = re.sub(r"(?m)^(  test_size:) \S+", rf"\1 {test_size}", text)
    parse_params(text, "the schema")
    if layout.marker.exists():
        if (folder / ".git").exists() and Git(folder).head() is not None:  # else git would look in the folders above
            raise BadInput(f"{folder} is a workspace already; work inside it, or choose another folder")
    elif folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; choose a new folder")
    elif folder.exists() and not all(_is_ours(entry.name) for entry in folder.iterdir()):
        raise BadInput(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not layout.marker.exists():
        write_json(layout.marker, {"layout": LAYOUT_VERSION, "workspace_id": uuid.uuid4().hex[:12]})
    workspace = open_workspace(folder)
    write_text(layout.params, text)
    write_text(layout.dvc_yaml, template("dvc.yaml"))
    write_text(folder / ".gitignore", "".join(f"{line}\n" for line in layout.ignored))
    write_json(layout.project, {})
    workspace.make_home()
    git = Git(folder)
    git.init()
    with Dvc(folder, layout.private / "dvc.json", layout.logs / "dvc.log") as dvc:
        dvc.init(remote or str(workspace.home / "dvc-remote"))
    layout.inbox.mkdir(parents=True, exist_ok=True)
    git.commit(
        "Make the workspace",
        [
            layout.marker,
            layout.params,
            layout.dvc_yaml,
            layout.rounds,
            folder / ".gitignore",
            folder / ".dvcignore",
            folder / ".dvc",
        ],
    )
    _ = workspace.clone_id
    return workspace


def _is_ours(name: str) -> bool:
    """Whether an otherwise empty folder may hold `name`: a repository just made, or what a killed call left."""
    return name == ".git" or name.startswith(TEMPORARY_PREFIX)


def with_schema(text: str, labels: Sequence[str], question: str | None) -> str:
    """The template with its labels (and question) replaced; comments stay."""
    import yaml

    def scalar(value: str) -> str:
        return str(yaml.safe_dump(value, allow_unicode=True, width=10_000, default_style='"')).strip()

    lines = "".join(f"    - {scalar(label)}\n" for label in labels)
    text = re.sub(r"(?m)^(  labels:.*\n)(?:    - .*\n)+", lambda found: found.group(1) + lines, text)
    if question is not None:
        text = re.sub(r"(?m)^  question:.*$", lambda _: f"  question: {scalar(question)}", text)
    return text
