"""Look at everything that a round needs and say how to fix what is wrong. Reads only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Literal

from al_pipeline.errors import AlError, ManualActionRequired, RepositoryError
from al_pipeline.files import read_json, read_object
from al_pipeline.integrations.dvc.session import describe_defects
from al_pipeline.integrations.git import Git
from al_pipeline.operations import publish
from al_pipeline.operations.checkout import check_not_ignored, check_ready
from al_pipeline.operations.close import absent_sources, check_sources, foreign_edits, is_closed
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.facts import open_dvc, read_facts
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingestion.source_states import source_news
from al_pipeline.operations.schedule import read_schedule
from al_pipeline.operations.schema import schema_problem
from al_pipeline.records import round_name
from al_pipeline.sanitize import counted, on_this_machine, redact
from al_pipeline.workspace.fingerprint import current_engine, difference
from al_pipeline.workspace.identity import identify
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.trust import doubtful, holds_secret
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

LOW_DISK_BYTES = 2 * 1024**3
CLOCK_TOLERANCE_SECONDS = 60.0
LABEL_STUDIO = (1, 23)
"""The oldest server that this engine was tried with."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `fix` says what to do about it."""

    check: str
    level: Literal["ok", "warning", "error"]
    message: str
    fix: str = ""

    def to_row(self) -> dict[str, str]:
        """This finding as a JSON object."""
        return asdict(self)


def examine(workspace: Workspace) -> list[Finding]:
    """Every check's findings, in the order in which they matter. A check that fails is a finding, not an error."""
    checks: tuple[tuple[str, Callable[[Workspace], Iterator[Finding]]], ...] = (
        ("versions", _versions),
        ("parameters", _parameters),
        ("git", _git),
        ("classes", _classes),
        ("identity", _identity),
        ("secrets", _secrets),
        ("data", _data),
        ("sources", _sources),
        ("remote", _remote),
        ("encoder", _encoder),
        ("engine", _engine),
        ("Label Studio", _label_studio),
        ("schedule", _schedule),
        ("disk", _disk),
        ("lock", _lock),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check(workspace)
        except AlError as error:
            if all(finding.message != str(error) for finding in findings):  # bad parameters stop several checks
                findings.append(Finding(name, "error", str(error)))
        except OSError as error:
            what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
            findings.append(Finding(name, "error", what, "see to the file system and its rights, then look again"))
    return findings


def _versions(_: Workspace) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("al-pipeline") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is installed, {need.specifier} works")
    if wrong:
        yield Finding("versions", "error", "; ".join(wrong), "install again, with the versions of requirements.lock")
    else:
        yield Finding("versions", "ok", f"al-pipeline {version('al-pipeline')} and what it is built on")


def _parameters(workspace: Workspace) -> Iterator[Finding]:
    schema = workspace.params.schema_
    yield Finding("parameters", "ok", f"params.yaml is valid; schema {schema.version}: {', '.join(schema.labels)}")


def _classes(workspace: Workspace) -> Iterator[Finding]:
    history = read_history(workspace.layout, Git(workspace.layout.root))
    if problem := schema_problem(workspace, history):
        yield Finding("classes", "error", str(problem))


def _git(workspace: Workspace) -> Iterator[Finding]:
    git = Git(workspace.layout.root)
    if git.head() is None:
        yield Finding("git", "error", "the workspace has no commit", "run `al init` again; it finishes what it began")
        return
    try:
        check_ready(workspace.layout, git)
        check_not_ignored(workspace.layout, git)
    except ManualActionRequired as error:
        yield Finding("git", "error", str(error))
    if damaged := git.check_objects():
        yield Finding(
            "git",
            "error",
            f"git has lost objects: {'; '.join(damaged[:3])}",
            "a complete clone or the git remote may have them still: `git fetch --refetch`, or copy its .git/objects",
        )
    if not git.has_identity():
        yield Finding(
            "git",
            "warning",
            "no name for commits is set; rounds are committed as `al`",
            "`git config user.name …` and `git config user.email …`",
        )
    tags = git.tags()
    missing = [
        round_name(record.round)
        for record in read_history(workspace.layout, git).rounds
        if round_name(record.round) not in tags
    ]
    if missing:
        fetch = "`git fetch --tags` brings those that the git remote has; " if git.remote() is not None else ""
        yield Finding(
            "git", "warning", f"tags are missing: {', '.join(missing)}", f"{fetch}`al round` makes them again"
        )
    yield from _git_remote(git, tags)


def _git_remote(git: Git, tags: dict[str, str]) -> Iterator[Finding]:
    """What the git remote has of the branch and of the rounds' tags, as of now."""
    remote, branch = git.remote(), git.branch()
    published, brought = set(git.files("HEAD", Layout().rounds.as_posix())), git.newcomers(Layout().rounds.as_posix())
    for name, commit in sorted(tags.items()):
        number = name.removeprefix("round-")
        if not (name.startswith("round-") and number.isdigit()):
            continue
        path = Layout().record(int(number)).as_posix()
        if path in published and brought.get(path) != commit and git.brought(path) != commit:
            yield Finding(
                "git",
                "error",
                f"the tag {name} names {commit[:12]}, and that round was published by {git.brought(path)[:12]}",
                f"`git tag -d {name}`, and `al round` makes it again; where the git remote has it so too, "
                f"`git push --delete {remote or 'origin'} {name}` first",
            )
    if remote is None or branch is None:
        yield Finding("git", "ok", f"branch {branch}, no git remote")
        return
    try:
        here, there, found = publish.round_tags(git, remote, f"refs/heads/{branch}")
    except RepositoryError as error:
        yield Finding("git", "warning", f"the git remote {remote} cannot be looked at: {error}")
        return
    for sentence in publish.other_tags(remote, here, there):
        yield Finding("git", "error", sentence)
    lacking = [name for name in here if name not in there]
    tip = found.get(f"refs/heads/{branch}", ("", ""))[1]
    if tip == git.head() and not lacking:
        yield Finding("git", "ok", f"branch {branch} and {len(here)} rounds' tags, as on {remote}")
        return
    tags_too = (
        f"{remote} lacks {', '.join(lacking[:3])}{' and more tags' if len(lacking) > 3 else ''}" if lacking else ""
    )
    problem, fix = _compared(git, remote, branch, tip)
    yield Finding("git", "warning", "; ".join(filter(None, (problem, tags_too))), fix)


def _compared(git: Git, remote: str, branch: str, tip: str) -> tuple[str, str]:
    """How the branch on the remote, whose last commit is `tip`, differs from the one here, and the way out."""
    pushes = "`al round` pushes"
    if not tip:
        return f"{remote} has no branch {branch}", pushes
    if (counts := git.ahead_behind(tip)) is None:
        return f"{remote} has commits of {branch} that are not here", "`git pull`"
    ahead, behind = counts
    ours, theirs = counted(ahead, "commit"), counted(behind, "commit")
    if ahead and behind:
        return f"{branch} and that of {remote} went apart: {ours} here, {theirs} there", "`git pull`"
    if behind:
        return (
            f"{remote} has {theirs} of {branch} that {'is' if behind == 1 else 'are'} not in this branch",
            "`git pull`",
        )
    return (f"{remote} lacks {ours} of {branch}" if ahead else ""), pushes


def _identity(workspace: Workspace) -> Iterator[Finding]:
    found = identify(workspace.layout)
    if found.verdict == "same":
        yield Finding("identity", "ok", f"clone {found.clone_id or 'without an id yet'} of workspace {workspace.id}")
    else:
        yield Finding("identity", "error", found.problem)


def _secrets(workspace: Workspace) -> Iterator[Finding]:
    found = list(_bared(workspace))
    yield from found
    if not found:
        yield Finding("secrets", "ok", "none was found where git, DVC or others on this machine would see it")


def _bared(workspace: Workspace) -> Iterator[Finding]:
    layout, found = workspace.layout, workspace.credentials_file
    for name, problem in doubtful(layout.root).items():
        yield Finding("secrets", "error", f"{name} {problem}", "`al trust` shows it and lets DVC use it")
    local = layout.root / ".dvc/config.local"
    for path in (found, *([local] if holds_secret(local) else [])):
        if path.exists() and path.stat().st_mode & 0o077:
            yield Finding("secrets", "error", f"others on this machine can read {path}", f"`chmod 600 {path}`")
    git = Git(layout.root)
    for remote in git.remotes_with_password():
        yield Finding(
            "secrets",
            "warning",
            f"the address of the git remote {remote} holds a password, which lies readable in .git/config",
            f"`git remote set-url {remote} ADDRESS` without it, and a credential helper (`git help credentials`)",
        )
    if (url := workspace.credentials().get("url", "")).startswith("http://") and not on_this_machine(url):
        yield Finding(
            "secrets",
            "warning",
            f"{redact(url)} is not https: the token and all texts can be read on the way",
            "give it the https address: `al labelstudio connect URL`",
        )


def _data(workspace: Workspace) -> Iterator[Finding]:
    layout = workspace.layout
    if _is_building(workspace):
        yield Finding("data", "ok", "a round is being built; `al round` goes on with it")
        return
    if changed := foreign_edits(layout, Git(layout.root)):
        yield Finding(
            "data",
            "error",
            f"changed by somebody else: {', '.join(changed[:5])}",
            "`git diff`, then `git checkout -- FILE`",
        )
    with replace(open_dvc(layout), state=None) as dvc:
        if absent := absent_sources(layout):
            yield Finding(
                "data",
                "warning",
                f"not here yet: {', '.join(absent)}",
                "`dvc pull`; else the next `al round` fetches what it needs",
            )
            return
        check_sources(layout, dvc)  # before anything reads the data themselves
    facts, _ = read_facts(workspace)
    yield Finding("data", "ok", f"{facts.items:,} items; ledger, pool and test set are as git's records say")


def _sources(workspace: Workspace) -> Iterator[Finding]:
    """Files of `ingest.sources` that the last tick could not read; what only waits for a minute of quiet is well."""
    failing = [one.sentence() for one in source_news(workspace.layout) if one.state == "failing"]
    if failing:
        more = f"; and {len(failing) - _MOST_SHOWN:,} more" if len(failing) > _MOST_SHOWN else ""
        yield Finding(
            "sources",
            "warning",
            "; ".join(failing[:_MOST_SHOWN]) + more,
            "fix or remove the file, or change ingest in params.yaml; every `al round` tries again",
        )


_MOST_SHOWN = 10


def _is_building(workspace: Workspace) -> bool:
    layout = workspace.layout
    planned = read_history(layout, Git(layout.root)).planned
    return layout.closing.exists() or is_closed(layout, planned)


def _remote(workspace: Workspace) -> Iterator[Finding]:
    layout = workspace.layout
    with replace(open_dvc(layout), state=None) as dvc:
        published = layout.dvc_lock.exists() and not _is_building(workspace)
        if published and (gone := dvc.absent_folder()):
            yield Finding(
                "remote",
                "error",
                f"the DVC remote {gone} is not there",
                "mount its disk, or give the address that it has now: `dvc remote list`, `dvc remote modify`",
            )
            return
        name = dvc.check_writable()
        checked, defects = dvc.check_remote() if published else (0, [])
    if not defects:
        yield Finding("remote", "ok", f"DVC remote {name} can be written and holds what the last commit names")
    elif len(defects) == checked and all(one.why == "missing" for one in defects):
        yield Finding(
            "remote",
            "error",
            f"the DVC remote {name} holds nothing of what the last commit names",
            "if that is not where the rounds were pushed to, `dvc remote modify` gives it the right address; if its "
            "objects are lost, `al remote repair` in a clone that has the data sends them again",
        )
    else:
        here = all(one.have for one in defects)
        yield Finding(
            "remote",
            "error",
            f"the DVC remote lacks what the last commit names, or holds other bytes of it: {describe_defects(defects)}",
            "`al remote repair` sends it" + (" from this clone" if here else "; run it in a clone that has the data"),
        )


def _encoder(workspace: Workspace) -> Iterator[Finding]:
    layout, features = workspace.layout, workspace.params.features
    if not features.uses_encoder:
        yield Finding("encoder", "ok", "none is needed: the features are TF-IDF alone")
        return
    have = read_object(layout.encoder / "source.json").get("source")
    if have == features.encoder:
        yield from _invariance(workspace, have)
    elif have is None and layout.encoder.relative_to(layout.root).as_posix() in absent_sources(layout):
        yield Finding("encoder", "ok", "versioned, and not here yet; it comes with the data")
    elif have is None:
        here = (layout.root / features.encoder).is_dir() or _is_installed(features.encoder)
        found = "is installed" if here else "will be fetched from the hub"
        yield Finding(
            "encoder",
            "ok",
            f"{features.encoder} {found}; the first `al round` copies it into the workspace, and doctor then "
            "tests whether its vectors depend on what shares their batch",
        )
    else:
        yield Finding(
            "encoder",
            "warning",
            f"params.yaml names {features.encoder}, the workspace holds {have}",
            "the next build replaces it",
        )


def _invariance(workspace: Workspace, source: str) -> Iterator[Finding]:
    """Whether vectors depend on their batch here, in each precision that the workspace uses: some forward passes."""
    from al_pipeline.features.encoder import Encoder, Precision, resolve_precision
    from al_pipeline.features.invariance import find_dependence
    from al_pipeline.params import FINETUNED

    features, model = workspace.params.features, workspace.params.train.model
    used: set[Precision] = {resolve_precision(features.precision)}
    if model == FINETUNED:
        used.add("float32")
    for precision in sorted(used):
        encoder = Encoder(workspace.layout.encoder, features.max_tokens, precision)
        if not (found := find_dependence(encoder)):
            continue
        yield Finding(
            "encoder",
            "error",
            f"on this machine a text's {precision} vector depends on what shares its batch ({found[0]}), so that "
            "rounds made here may not come out again",
            "set `features.precision: float32` in params.yaml"
            if precision != "float32"
            else "run rounds on another machine, or with the torch of requirements.lock",
        )
        return
    tested = " and ".join(sorted(used))
    yield Finding(
        "encoder",
        "ok",
        f"{source}, in the workspace and versioned; in {tested} its vectors do not depend on what shares their batch",
    )


def _is_installed(source: str) -> bool:
    try:
        return bool(version(source))
    except (PackageNotFoundError, ValueError):
        return False


def _engine(workspace: Workspace) -> Iterator[Finding]:
    recorded = read_json(workspace.layout.engine)
    if recorded is None:
        yield Finding("engine", "ok", f"{current_engine()['version']}; nothing was built yet")
    elif changes := difference(recorded):
        yield Finding(
            "engine",
            "warning",
            f"not the one of the last build: {changes}",
            "the next build runs under this one; older rounds stay as they are",
        )
    else:
        yield Finding("engine", "ok", f"{current_engine()['version']}, the one of the last build")


def _label_studio(workspace: Workspace) -> Iterator[Finding]:
    with closing(connect(workspace)) as oracle:
        yield from _label_studio_at(workspace, oracle)


def _label_studio_at(workspace: Workspace, oracle: LabelStudioOracle) -> Iterator[Finding]:
    about = oracle.about()
    yield Finding("Label Studio", "ok", f"version {about.version} at {oracle.url}, as {about.user}")
    numbers = tuple(int(part) for part in about.version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < LABEL_STUDIO:
        yield Finding(
            "Label Studio", "warning", f"version {about.version} is older than any tried", "upgrade to 1.23 or newer"
        )
    if about.clock_ahead is not None and abs(about.clock_ahead) > CLOCK_TOLERANCE_SECONDS:
        yield Finding(
            "clock",
            "warning",
            f"Label Studio's clock differs by {about.clock_ahead:+.0f} s",
            "let both machines use NTP",
        )
    else:
        yield Finding("clock", "ok", "agrees with Label Studio's")
    known = stored_project(workspace.layout)
    if known:
        oracle.check(known, workspace.id, workspace.clone_id)
        yield Finding("project", "ok", f"project {known.project_id} is ours")
    else:
        yield Finding("project", "ok", "none yet; the first `al round` makes one")


def _schedule(workspace: Workspace) -> Iterator[Finding]:
    found = read_schedule(workspace)
    says = f"{found.wanted.cron} {found.wanted.timezone}"
    if found.server is None:
        off = "" if found.wanted.active else " (off)"
        yield Finding("schedule", "ok", f"{says}{off}; no Prefect server of its own is up, so nothing runs by itself")
    elif found.deployment is None:
        yield Finding("schedule", "warning", f"Prefect was never told of {says}", "`al schedule apply`")
    elif found.differs:
        yield Finding("schedule", "warning", "; ".join(found.differs), "`al schedule apply`, or change params.yaml")
    elif not found.worker:
        yield Finding("schedule", "warning", "no worker takes the runs that are due", "`al up` starts it")
    elif not found.wanted.active:
        yield Finding("schedule", "ok", "off, as in Prefect")
    else:
        yield Finding("schedule", "ok", f"{says}, as in Prefect; next run {found.next_run or 'not yet set'}")


def _disk(workspace: Workspace) -> Iterator[Finding]:
    for folder in (workspace.layout.root, workspace.home):
        if folder.exists() and not os.access(folder, os.W_OK):
            yield Finding(
                "disk",
                "error",
                f"{folder} cannot be written: its file system is read-only, or you have no right to",
                "make it writable (`mount`, `chmod`) before the next round",
            )
    free = shutil.disk_usage(workspace.layout.root).free
    level: Literal["ok", "warning"] = "ok" if free >= LOW_DISK_BYTES else "warning"
    yield Finding(
        "disk", level, f"{free / 1024**3:.1f} GiB free", "" if level == "ok" else "make room before the next round"
    )


def _lock(workspace: Workspace) -> Iterator[Finding]:
    owner = holder(workspace.layout.lock)
    if owner:
        yield Finding(
            "lock", "ok", f"held by {owner.get('purpose')} (process {owner.get('pid')}) since {owner.get('since')}"
        )
    else:
        yield Finding("lock", "ok", "free")
