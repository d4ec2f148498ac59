"""Scenarios of the machine and its users: disks, permissions, git, clocks, concurrent commands."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from al_pipeline.files import sha256_file
from al_pipeline.integrations.git import Git
from chaos.lab import FaultCount, Lab, Scenario
from chaos.network import local
from chaos.sites import Ended, Failure, Site, expect, stopped_before

DISK_MIB = 48
CLOCK_SECONDS = -3 * 86_400

WITHOUT_OVERRIDE = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
    "--",
)
"""For root: file permissions apply to this command too."""

FULL_AT = ("pull", "close", "label", "train", "select", "decide", "publish", "tag", "push")


def machine_scenarios() -> Iterator[Scenario]:
    """All of them."""
    for step in FULL_AT:
        yield Scenario(f"disk full at {step}", "disk full", partial(_disk_full, step=step))
    yield Scenario("files limited", "limit on the size of a file", _file_limit)
    stories: tuple[tuple[str, str, Callable[[Lab, FaultCount], None]], ...] = (
        ("remote read-only", "DVC remote read-only", _remote_read_only),
        ("workspace read-only", "workspace not writable", _workspace_read_only),
        ("remote lacks an object", "DVC remote lacks an object", _remote_lacks),
        ("remote and cache lack an object", "DVC remote lacks an object", _remote_and_cache_lack),
        ("edited plan", "work tree edited", _edited_plan),
        ("edited ledger", "work tree edited", _edited_ledger),
        ("edited in the middle", "work tree edited", _edited_in_the_middle),
        ("user's own work", "work tree edited", _own_work),
        ("foreign commit", "foreign commit in between", _foreign_commit),
        ("foreign commit in the middle", "foreign commit in between", _foreign_commit_in_the_middle),
        ("index locked", "git's index locked", _index_locked),
        ("HEAD detached", "HEAD detached", _detached),
        ("HEAD detached in the middle", "HEAD detached", _detached_in_the_middle),
        ("git remote away", "git remote out of reach", _git_remote_away),
        ("clock back", "clock steps back", _clock_back),
        ("clock back, real", "clock steps back", _clock_back_real),
        ("two at once", "two ticks at once", _two_at_once),
        ("two at once, by chance", "two ticks at once", _two_by_chance),
        ("two clones", "two clones at once", _two_clones),
        ("Prefect restarted", "Prefect server restarted in the middle", _prefect_restarted),
        ("Prefect gone", "Prefect server gone in the middle", _prefect_gone),
    )
    for name, kind, play in stories:
        yield Scenario(name, kind, play, real="real" in name or "clones" in name)


# Disks and rights ----------------------------------------------------------------------------------------------------


def _disk_full(lab: Lab, tally: FaultCount, step: str) -> None:
    """The disk with the workspace and its remotes fills up before a step; later there is room again."""
    draw = random.Random(f"disk {step}")
    with _small_disk(lab.folder / f"disk-{step}") as disk:
        place = disk / "site"
        with lab.site(lab.reference.before(1, step), place) as site, stopped_before(site, step) as tick:
            ballast = disk / "ballast"
            _fill(ballast, leave=draw.choice((0, 4096, 20_000)))
            tick.go_on()
            ended = tick.end()
            tally.strike(ended.code != 0)  # the rest of the tick may need less than the rest of the disk
            _says_that_it_failed(ended)
            if ended.code:
                expect("No space left" in ended.message or "disk" in ended.message, f"what is full? {ended.message}")
            ballast.unlink()
            tally.recovered(site)
            site.check()


@contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def _fill(ballast: Path, leave: int) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


def _says_that_it_failed(ended: Ended) -> None:
    expect(ended.code in (0, 5, 6), f"expected exit code 5 or 6, got {ended.short}")
    expect("Traceback" not in ended.err, f"a tick ended with a traceback: {ended.err[-1500:]}")


def _file_limit(lab: Lab, tally: FaultCount) -> None:
    """`ulimit -f`: no file can grow beyond 2 kB."""
    with lab.site(lab.reference.before(1, "close")) as site:
        site.wrapper = ("prlimit", "--fsize=2000", "--")
        tally.strike()
        site.refused(5)
        site.wrapper = ()
        tally.recovered(site)
        site.check()


@contextmanager
def _rights_matter(site: Site) -> Iterator[None]:
    """Ticks in the block cannot do what file permissions forbid, even as root."""
    site.wrapper = WITHOUT_OVERRIDE if os.geteuid() == 0 else ()
    try:
        yield
    finally:
        site.wrapper = ()


def _set_rights(folder: Path, rights: int) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(rights)


def _remote_read_only(lab: Lab, tally: FaultCount) -> None:
    with lab.site(lab.reference.before(1, "publish")) as site, _rights_matter(site):
        before = site.git.head()
        _set_rights(site.folder / "remote", 0o555)
        tally.strike()
        site.refused(5, "dvc push", "Permission denied", "al doctor")
        expect(site.git.head() == before and not site.git.tags(), "a round was published without its data")
        _set_rights(site.folder / "remote", 0o755)
        tally.recovered(site)
        site.check()


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """`folder` as a read-only file system. Permissions would not suffice: a tick restores those of its own folders."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _workspace_read_only(lab: Lab, tally: FaultCount) -> None:
    with lab.site("start-1") as site:
        before = local(site)
        for folder in (site.layout.inbox_events.parent, site.layout.private, site.root):
            with _read_only(folder):
                tally.strike()
                ended = site.refused(5, "Read-only file system")
                expect(local(site) == before, f"a tick that could not write {folder} changed something: {ended.short}")
        tally.recovered(site)
        site.check()


# The DVC remote ------------------------------------------------------------------------------------------------------


def _objects(folder: Path) -> list[Path]:
    """Every object of a DVC remote or cache, by name."""
    return sorted(path for path in folder.glob("files/md5/*/*"))


def _remote_lacks(lab: Lab, tally: FaultCount) -> None:
    """Somebody empties the remote between two rounds; we still have everything, and upload it again."""
    with lab.site("start-2") as site:
        before = {path.name for path in _objects(site.folder / "remote")}
        for path in _objects(site.folder / "remote"):
            path.unlink()
        tally.strike()
        tally.recovered(site)
        site.check()
        _clone_goes_back(site, lab, ("round-0001",))
        expect(before, "there was nothing to lose")


def _remote_and_cache_lack(lab: Lab, tally: FaultCount) -> None:
    """An object of an earlier round is lost everywhere: no round is tagged until it is back."""
    with lab.site(lab.reference.before(1, "publish")) as site:
        lost = sha256_file(site.layout.queries)
        kept = site.folder / "kept"
        [held] = [path for path in _objects(site.root / ".dvc/cache") if sha256_file(path) == lost]
        shutil.move(held, kept)
        tally.strike()
        before = site.git.head()
        ended = site.round()
        if ended.code:
            expect(ended.code == 5, f"expected exit code 5, got {ended.short}")
            expect("queries" in ended.message or "al doctor" in ended.message, f"what is missing? {ended.message}")
            expect(site.git.head() == before and not site.git.tags(), "a round was published without its data")
            held.parent.mkdir(exist_ok=True)
            shutil.copy(kept, held)
        tally.recovered(site)
        site.check()
        _clone_goes_back(site, lab, ("round-0000",))


def _clone_goes_back(site: Site, lab: Lab, tags: tuple[str, ...]) -> None:
    """A fresh clone gets all data of these tags from the remote alone."""
    clone = site.folder / "clone"
    run = partial(subprocess.run, check=True, capture_output=True, env={**site.environment, "PATH": _tools()})
    run(["git", "clone", "--quiet", str(site.folder / "origin.git"), str(clone)])
    for tag in tags:
        run(["git", "checkout", "--quiet", tag], cwd=clone)
        done = subprocess.run(
            ["dvc", "pull"], cwd=clone, env={**site.environment, "PATH": _tools()}, capture_output=True, text=True
        )
        expect(done.returncode == 0, f"{tag} cannot be had from the remote: {done.stderr[-600:]}")
    shutil.rmtree(clone)


def _tools() -> str:
    from harness import tools_first

    return tools_first()["PATH"]


# The work tree -------------------------------------------------------------------------------------------------------


def _edited_plan(lab: Lab, tally: FaultCount) -> None:
    with lab.site("start-1") as site:
        plan = site.layout.plan(0)
        edited = plan.read_text("utf-8").replace("mail", "male", 1)
        plan.write_text(edited, "utf-8")
        tally.strike()
        site.refused(6, "rounds/0000/plan.jsonl", "git diff", "git checkout")
        expect(plan.read_text("utf-8") == edited, "somebody's edit was overwritten")
        site.git.run("checkout", "--", "rounds/0000/plan.jsonl")
        tally.recovered(site)
        site.check()


def _edited_ledger(lab: Lab, tally: FaultCount) -> None:
    with lab.site("start-2") as site:
        part = next(site.layout.events.glob("part-*.jsonl"))
        right = part.read_bytes()
        part.write_bytes(right.replace(b'"ham"', b'"spam"', 1))
        tally.strike()
        site.refused(6, "data/events", "dvc checkout")
        expect(part.read_bytes() != right, "somebody's edit was overwritten")
        part.write_bytes(right)
        tally.recovered(site)
        site.check()


def _edited_in_the_middle(lab: Lab, tally: FaultCount) -> None:
    """A published file is edited while a build runs: the edit must not get into our commit."""
    with lab.site(lab.reference.before(1, "train")) as site:
        plan = site.layout.plan(0)
        right = plan.read_text("utf-8")
        with stopped_before(site, "train") as tick:
            plan.write_text(right.replace("mail", "male", 1), "utf-8")
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 6 and "rounds/0000/plan.jsonl" in ended.message, f"it was not named: {ended.short}")
        expect(not site.git.tags(), "a round was published with somebody's edit in it")
        plan.write_text(right, "utf-8")
        tally.recovered(site)
        site.check()


def _own_work(lab: Lab, tally: FaultCount) -> None:
    """Files that the engine does not own stay as they are, staged or not."""
    with lab.site("start-1") as site:
        (site.root / "notes.txt").write_text("mine\n")
        (site.root / "staged.txt").write_text("mine too\n")
        site.git.run("add", "staged.txt")
        tally.strike()
        tally.recovered(site)
        status = site.git.run("status", "--porcelain").stdout.splitlines()
        expect(sorted(status) == ["?? notes.txt", "A  staged.txt"], f"somebody's own work was touched: {status}")
        for name in ("notes.txt", "staged.txt"):
            site.git.run("rm", "--quiet", "--cached", "--ignore-unmatch", name)
            (site.root / name).unlink()
        site.check()


def _commit_something(site: Site) -> str:
    (site.root / "NOTES.md").write_text("What we think of it.\n")
    site.git.run("add", "NOTES.md")
    site.git.run("commit", "--quiet", "--message", "Somebody's own commit")
    return str(site.git.head())


def _foreign_commit(lab: Lab, tally: FaultCount) -> None:
    with lab.site("start-1") as site:
        commit = _commit_something(site)
        tally.strike()
        tally.recovered(site)
        _is_kept(site, commit)
        site.check()


def _foreign_commit_in_the_middle(lab: Lab, tally: FaultCount) -> None:
    with lab.site(lab.reference.before(1, "publish")) as site:
        with stopped_before(site, "publish") as tick:
            commit = _commit_something(site)
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 0, f"expected success, got {ended.short}")
        tally.recovered(site)
        _is_kept(site, commit)
        site.check()


def _is_kept(site: Site, commit: str) -> None:
    found = site.git.run("merge-base", "--is-ancestor", commit, "HEAD", check=False)
    expect(found.returncode == 0, "somebody's own commit is no longer in the history")


def _index_locked(lab: Lab, tally: FaultCount) -> None:
    """First by a running git (a person waits for it), then by one that was killed (its lock is removed)."""
    with lab.site(lab.reference.before(1, "publish")) as site:
        editor = {**site.environment, "GIT_EDITOR": "sleep 600 #"}
        (site.root / "NOTES.md").write_text("What we think of it.\n")
        site.git.run("add", "NOTES.md")
        with subprocess.Popen(["git", "commit", "--all"], cwd=site.root, env=editor, start_new_session=True) as git:
            lock = site.root / ".git/index.lock"
            _wait_for(lock.exists)
            tally.strike()
            site.refused(5, "git (process", "try again when it has ended")
            os.killpg(git.pid, 9)
        expect(lock.exists(), "the killed git left no lock")
        tally.strike()
        tally.recovered(site)
        site.git.run("reset", "--quiet", "--", "NOTES.md")
        (site.root / "NOTES.md").unlink(missing_ok=True)
        site.check()


def _wait_for(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise Failure("waited in vain")
        time.sleep(0.01)


def _detached(lab: Lab, tally: FaultCount) -> None:
    with lab.site("start-1") as site:
        site.git.run("checkout", "--quiet", "--detach")
        tally.strike()
        before = local(site)
        site.refused(6, "HEAD is detached", "git switch main")
        expect(local(site) == before, "a tick that failed changed something")
        site.git.run("switch", "--quiet", "main")
        tally.recovered(site)
        site.check()


def _detached_in_the_middle(lab: Lab, tally: FaultCount) -> None:
    with lab.site(lab.reference.before(1, "publish")) as site:
        before = site.git.head()
        with stopped_before(site, "publish") as tick:
            site.git.run("checkout", "--quiet", "--detach")
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 6 and "git switch main" in ended.message, f"expected exit code 6, got {ended.short}")
        expect(site.git.head() == before, "a commit was made on a detached HEAD")
        site.git.run("switch", "--quiet", "main")
        tally.recovered(site)
        site.check()


def _git_remote_away(lab: Lab, tally: FaultCount) -> None:
    """It must not keep people from labelling; a later tick catches up."""
    with lab.site("start-1") as site:
        away = site.folder / "away.git"
        (site.folder / "origin.git").rename(away)
        tally.strike()
        ended = site.round()
        expect(ended.code == 0 and ended.told["published"] == [0], f"expected a published round, got {ended.short}")
        expect(any("git remote" in line for line in ended.told["warnings"]), "nothing is said of the git remote")
        away.rename(site.folder / "origin.git")
        tally.recovered(site)
        site.check()


# Clocks --------------------------------------------------------------------------------------------------------------


def _clock_back(lab: Lab, tally: FaultCount) -> None:
    """The clock is set back by days, so existing files have times in the future."""
    with lab.site("start-1") as site:
        _back_in_time(site, tally)


def _clock_back_real(lab: Lab, tally: FaultCount) -> None:
    with lab.studio_site() as site:
        site.recover()
        site.answer()
        _back_in_time(site, tally)


def _back_in_time(site: Site, tally: FaultCount) -> None:
    future = time.time() - CLOCK_SECONDS
    for path in site.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (future, future))
    site.extra["CHAOS_CLOCK"] = str(CLOCK_SECONDS)
    tally.strike()
    tally.recovered(site)
    site.check()
    site.answer()
    tally.recovered(site)
    site.extra.pop("CHAOS_CLOCK")
    site.check()


# Two at once ---------------------------------------------------------------------------------------------------------


def _two_at_once(lab: Lab, tally: FaultCount) -> None:
    with lab.site(lab.reference.before(1, "train")) as site:
        with stopped_before(site, "train") as tick:
            tally.strike()
            site.refused(4, "busy: a tick", f"process {tick.pid} on", "since", "try again when it has ended")
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 0, f"the first was disturbed: {ended.short}")
        tally.recovered(site)
        site.check()


def _two_by_chance(lab: Lab, tally: FaultCount) -> None:
    """Five at the same time, repeatedly."""
    with lab.site("start-1") as site:
        ticks = [site.start() for _ in range(5)]
        tally.strike(len(ticks) - 1)
        ended = [tick.end() for tick in ticks]
        codes = sorted(one.code for one in ended)
        expect(set(codes) <= {0, 4} and 0 in codes, f"exit codes {codes}: {[one.short for one in ended]}")
        tally.recovered(site)
        site.check()


def _two_clones(lab: Lab, tally: FaultCount) -> None:
    """The second clone may only read, also while the first one works. Then they swap roles twice with `al adopt`.

    Each swap happens in the middle of a tick of the clone that had the project; that tick is killed.
    """
    with lab.studio_site() as site:
        site.recover()
        site.answer()
        second = _clone_of(site)
        with stopped_before(site, "pull") as tick:
            tally.strike()
            second.refused(6, "another clone", "al adopt")
            tick.go_on()
            ended = tick.end()
        expect(ended.code == 0 and ended.told["published"] == [0], f"the first was disturbed: {ended.short}")
        tally.recovered(site)
        site.check()
        for old, new in ((site, second), (second, site)):
            site.answer()
            _is_behind(new)
            new.git.run("pull", "--quiet", "--ff-only", "--tags", "origin", "main")
            new.dvc("pull")
            tick = old.start(at="before:close:1:stop")
            expect(tick.stopped(), "the tick ended before it came to close")
            new.al("adopt")
            tick.kill()
            tally.strike()
            before = local(old)
            old.refused(6, "another clone", "al adopt")
            expect(local(old) == before, "a clone that may only read changed something")
            tally.recovered(new)
            new.check()


def _is_behind(site: Site) -> None:
    """It lacks a round that the other clone published, and must not publish one under the same number."""
    done = site.run_al("adopt", "--json")
    expect(done.returncode == 6, f"a clone that lacks rounds took the project: {done.stdout}{done.stderr}")
    expect("ahead of this clone" in done.stdout, f"it does not say what is missing: {done.stdout}")


def _clone_of(site: Site) -> Site:
    """Another clone of the same workspace, with the same people and the same remotes."""
    folder = site.folder / "second"
    folder.mkdir()
    for name in ("origin.git", "remote"):
        (folder / name).symlink_to(site.folder / name)
    Git(site.folder).run("clone", "--quiet", "origin.git", "second/workspace")
    return Site(folder, site.people, site.truth, site.expected, site.outside / "second")


# Prefect -------------------------------------------------------------------------------------------------------------


def _prefect_restarted(lab: Lab, tally: FaultCount) -> None:
    with lab.flow_site(lab.reference.before(1, "train")) as site:
        with stopped_before(site, "train") as tick:
            lab.prefect.stop()
            lab.prefect.start()
            tally.strike()
            tick.go_on()
            ended = tick.end()
        expect("Traceback" not in ended.err, f"a tick ended with a traceback: {ended.err[-1500:]}")
        tally.recovered(site)
        site.check()


def _prefect_gone(lab: Lab, tally: FaultCount) -> None:
    """Down for the rest of the tick; the next one runs without it."""
    with lab.flow_site(lab.reference.before(1, "train")) as site:
        with stopped_before(site, "train") as tick:
            lab.prefect.stop()
            tally.strike()
            tick.go_on()
            ended = tick.end()
        try:
            expect("Traceback" not in ended.err, f"a tick ended with a traceback: {ended.err[-1500:]}")
            expect(ended.code in (0, 5), f"expected exit code 5, got {ended.short}")
            tally.recovered(site)
            site.check()
        finally:
            lab.prefect.start()
