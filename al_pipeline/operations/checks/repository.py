"""Checks of the git repository, the identity of this clone, and exposed secrets."""

from __future__ import annotations

from collections.abc import Iterator

from al_pipeline.errors import ManualActionRequired, RepositoryError
from al_pipeline.integrations.git import Git
from al_pipeline.operations import publish
from al_pipeline.operations.checkout import check_not_ignored, check_ready
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.history import read_history
from al_pipeline.operations.schema import schema_problem
from al_pipeline.records import round_name
from al_pipeline.sanitize import counted, on_this_machine, redact
from al_pipeline.workspace.identity import identify
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import doubtful, holds_secret
from al_pipeline.workspace.workspace import Workspace


def check_classes(workspace: Workspace) -> Iterator[Finding]:
    """Check that the classes of `params.yaml` are a permitted successor of the published ones."""
    history = read_history(workspace.layout, Git(workspace.layout.root))
    if problem := schema_problem(workspace, history):
        yield Finding("classes", "error", str(problem))


def check_git(workspace: Workspace) -> Iterator[Finding]:
    """Check the repository's state, objects, tags and remote."""
    git = Git(workspace.layout.root)
    if git.head() is None:
        yield Finding("git", "error", "the workspace has no commit", "run `al init` again; it completes the workspace")
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
            "a complete clone or the git remote may still have them: `git fetch --refetch`, or copy its .git/objects",
        )
    if not git.has_identity():
        yield Finding(
            "git",
            "warning",
            "git has no user name configured; rounds are committed as `al`",
            "`git config user.name …` and `git config user.email …`",
        )
    tags = git.tags()
    missing = [
        round_name(record.round)
        for record in read_history(workspace.layout, git).rounds
        if round_name(record.round) not in tags
    ]
    if missing:
        fetch = "`git fetch --tags` fetches those that the git remote has; " if git.remote() is not None else ""
        yield Finding(
            "git", "warning", f"tags are missing: {', '.join(missing)}", f"{fetch}`al round` creates them again"
        )
    yield from check_git_remote(git, tags)


def check_git_remote(git: Git, tags: dict[str, str]) -> Iterator[Finding]:
    """Check the rounds' tags, and compare them and the branch with the git remote as it is now."""
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
                f"the tag {name} names {commit[:12]}, but {git.brought(path)[:12]} published that round",
                f"`git tag -d {name}`, then `al round` creates it again; if the git remote has the wrong tag too, "
                f"first `git push --delete {remote or 'origin'} {name}`",
            )
    if remote is None or branch is None:
        yield Finding("git", "ok", f"branch {branch}, no git remote")
        return
    try:
        here, there, found = publish.round_tags(git, remote, f"refs/heads/{branch}")
    except RepositoryError as error:
        yield Finding("git", "warning", f"the git remote {remote} cannot be read: {error}")
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
    """How the remote branch, whose last commit is `tip`, differs from the local one, and the fix."""
    pushes = "`al round` pushes"
    if not tip:
        return f"{remote} has no branch {branch}", pushes
    if (counts := git.ahead_behind(tip)) is None:
        return f"{remote} has commits of {branch} that are not here", "`git pull`"
    ahead, behind = counts
    ours, theirs = counted(ahead, "commit"), counted(behind, "commit")
    if ahead and behind:
        return f"{branch} and that of {remote} have diverged: {ours} here, {theirs} there", "`git pull`"
    if behind:
        return (
            f"{remote} has {theirs} of {branch} that {'is' if behind == 1 else 'are'} not in this branch",
            "`git pull`",
        )
    return (f"{remote} lacks {ours} of {branch}" if ahead else ""), pushes


def check_clone(workspace: Workspace) -> Iterator[Finding]:
    """Check that this folder is the clone that it claims to be."""
    found = identify(workspace.layout)
    if found.verdict == "same":
        yield Finding("identity", "ok", f"clone {found.clone_id or 'without an id yet'} of workspace {workspace.id}")
    else:
        yield Finding("identity", "error", found.problem)


def check_secrets(workspace: Workspace) -> Iterator[Finding]:
    """Look for secrets that others can read."""
    found = list(_bared(workspace))
    yield from found
    if not found:
        yield Finding("secrets", "ok", "no secret is where git, DVC or others on this machine would see it")


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
            f"the address of the git remote {remote} contains a password, which is readable in .git/config",
            f"`git remote set-url {remote} ADDRESS` with the address without it, and use a credential helper (`git "
            "help credentials`)",
        )
    if (url := workspace.credentials().get("url", "")).startswith("http://") and not on_this_machine(url):
        yield Finding(
            "secrets",
            "warning",
            f"{redact(url)} is not https: the token and all texts can be intercepted",
            "use its https address: `al labelstudio connect URL`",
        )
