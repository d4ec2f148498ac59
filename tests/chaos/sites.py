"""One workspace under attack: its ticks as real processes, the people who answer, and what must hold at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
from embedded import REPOSITORY
from harness import ENVIRONMENT, NOT_THE_USERS, tools_first

from al_pipeline.data.ledger import read_events, read_refused
from al_pipeline.files import read_json, sha256_bytes, sha256_tree
from al_pipeline.integrations import forks
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.records import Event, round_name
from al_pipeline.workspace.layout import Layout
from chaos.twin import TwinServer

ANN, BOB = "ann.chaos@example.com", "bob.chaos@example.com"

_TESTS = str(REPOSITORY / "tests")
_TICKER = f"import sys; sys.path.insert(0, {_TESTS!r}); from chaos.ticker import main; main()"
"""Not by PYTHONPATH: a fork server forks only for processes that would import what it did."""

TICK_SECONDS = 240.0
"""The time limit of one tick on a busy machine."""

MOST_TICKS = 4
"""The maximum number of ticks after a fault until the round waits for people again."""

LATEST = ("labeled", "test_labels", "unresolved", "model", "queries", "plan")
"""What the digests of a record must not depend on, whatever faults there were."""

Said = tuple[str, str | None]
"""An annotator, and the label that they chose; None for a skip."""


class Failure(AssertionError):
    """The product violated a property that must hold."""


def expect(holds: object, message: str) -> None:
    """Raise Failure with `message` unless `holds`."""
    if not holds:
        raise Failure(message)


def said(push_key: str, truth: Mapping[str, str]) -> list[Said]:
    """Who answers a task and how: a function of its push key (without the workspace's id, which differs by run)."""
    asked = push_key.split(":", 1)[1]
    right = truth[asked.split(":", 1)[1]]
    draw = bytes.fromhex(sha256_bytes(asked.encode()))
    if draw[0] < 16:
        return [(ANN, None), (BOB, None)]
    wrong = "ham" if right == "spam" else "spam"
    return [((ANN, BOB)[draw[1] % 2], wrong if draw[0] < 40 else right)]


class People(Protocol):
    """The annotators, at whichever Label Studio there is."""

    given: dict[tuple[str, str], str | None]
    """(push key, annotator) -> label, None for a skip: all answers so far."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a tick needs to reach their Label Studio."""
        ...

    def answer(self, truth: Mapping[str, str], most: int | None = None) -> int:
        """Answer all open tasks, or the first `most` of them; returns the number of tasks."""
        ...

    def keys(self) -> list[str]:
        """The push keys of all tasks in Label Studio, by id."""
        ...


class TwinPeople:
    """People at the twin."""

    def __init__(self, server: TwinServer, given: Mapping[tuple[str, str], str | None]) -> None:
        self._server = server
        self.given = dict(given)

    @property
    def environment(self) -> dict[str, str]:
        """See People."""
        return {"CHAOS_TWIN": str(self._server.address)}

    @property
    def oracle(self) -> SimulatedOracle:
        """The twin itself."""
        return self._server.oracle

    def answer(self, truth: Mapping[str, str], most: int | None = None) -> int:
        """See People."""
        with self._server.lock:
            [number] = self.oracle.projects
            open_keys = self.oracle.queue("somebody@example.com", number)
            fresh = [key for key in open_keys if all(task != key for task, _ in self.given)][:most]
            for key in fresh:
                for who, label in said(key, truth):
                    if label is None:
                        self.oracle.skip(key, who, number)
                    else:
                        self.oracle.answer(key, who, label, number)
                    self.given[key, who] = label
        return len(fresh)

    def keys(self) -> list[str]:
        """See People."""
        with self._server.lock:
            return [
                str(task.data["push_key"])
                for _, project in sorted(self.oracle.projects.items())
                for _, task in sorted(project.tasks.items())
                if task.annotations or not task.retired
            ]


@dataclass(frozen=True)
class Ended:
    """How a tick's process ended."""

    code: int
    """The exit code; if killed, the signal's negative number."""
    told: Mapping[str, Any]
    """Its JSON output."""
    err: str
    seconds: float

    @property
    def message(self) -> str:
        """The error's message; empty if there is none."""
        return str(self.told.get("message", ""))

    @property
    def short(self) -> str:
        """How it ended, in one line for a failure's message."""
        return f"exit code {self.code}: {self.message or self.err[-600:] or dict(self.told)}"


@dataclass(frozen=True)
class Recovery:
    """The ticks and the time until the round waited for people again."""

    ticks: int
    seconds: float


class Tick:
    """A running tick as a process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], outputs: Path, **more: Any) -> None:
        # Files, not pipes: what a killed tick left running would keep a pipe open.
        self._out, self._err = outputs.with_suffix(".out"), outputs.with_suffix(".err")
        self._begin = time.perf_counter()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **more
            )
        self.pid = self.process.pid

    def stopped(self, seconds: float = TICK_SECONDS) -> bool:
        """Wait until it has stopped itself (True) or ended (False). Raises Failure after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.returncode is not None:
                return False
            found, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            if found:
                if os.WIFSTOPPED(status):
                    return True
                self.process.returncode = os.waitstatus_to_exitcode(status)
                return False
            time.sleep(0.005)
        self.kill()
        raise Failure(f"a tick did not end within {seconds:.0f} s")

    def go_on(self) -> None:
        """Let it continue."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> Ended:
        """kill -9 of this process alone; its children continue."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.end()

    def end(self) -> Ended:
        """Wait for its end."""
        expect(not self.stopped(), "a tick stopped itself once more than was asked")
        seconds = time.perf_counter() - self._begin
        out, err = (path.read_text("utf-8", "replace") for path in (self._out, self._err))
        told = json.loads(out) if out.lstrip().startswith("{") and self.process.returncode >= 0 else {}
        code = self.process.returncode
        if code == 3 and told.get("changed") is False:  # there was nothing to do, which is not a failure here
            code = 0
        return Ended(code, told, err, seconds)


@dataclass
class Site:
    """A copy of the workspace in `folder`, with a DVC remote and a git remote of its own, and its people."""

    folder: Path
    people: People
    truth: Mapping[str, str]
    expected: Sequence[Mapping[str, str]]
    """The undisturbed run's digests: of the first build, then of each round."""
    outside: Path
    """A folder for what must not be on the site's disk: DVC's and `al`'s own files, the output of ticks."""
    extra: dict[str, str] = field(default_factory=dict)
    """Additional variables for the ticks."""
    wrapper: tuple[str, ...] = ()
    """A prefix of each tick's command."""
    real: bool = False
    """Whether ticks run the unchanged command line; otherwise through `chaos.ticker`."""
    _ticks: list[Tick] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outside.mkdir(parents=True, exist_ok=True)
        (self.outside / "dvc").mkdir(mode=0o700, exist_ok=True)  # a manual `dvc` would make it writable by all

    @property
    def root(self) -> Path:
        return self.folder / "workspace"

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def git(self) -> Git:
        return Git(self.root)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of ticks, without anything of the user's."""
        private = ("AL_", "CHAOS_", "PREFECT_", "PYTEST_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(private)}
        servers = {forks.FOLDER: os.environ[forks.FOLDER]} if forks.FOLDER in os.environ else {}
        return {
            **{name: value for name, value in kept.items() if name not in NOT_THE_USERS},
            **ENVIRONMENT,
            **servers,
            "AL_HOME": str(self.outside / "home"),
            "DVC_SITE_CACHE_DIR": str(self.outside / "dvc"),
            **self.people.environment,
            **self.extra,
        }

    def start(self, *words: str, at: str | None = None, root: Path | None = None, **variables: str) -> Tick:
        """Start `al round` in a process of its own; see `chaos.ticker` for `at`."""
        module = ("-m", "al_pipeline.cli.app") if self.real and at is None else ("-c", _TICKER)
        command = [*self.wrapper, sys.executable, *module, "-C", str(root or self.root), "round", "--json", *words]
        armed = {} if at is None else {"CHAOS_AT": at}
        outputs = self.outside / f"tick-{len(self._ticks)}"
        self._ticks.append(Tick(command, {**self.environment, **armed, **variables}, outputs))
        return self._ticks[-1]

    def start_live(self) -> Tick:
        """Start `al live` in a process of its own."""
        return self.start_command("live")

    def start_command(self, *words: str) -> Tick:
        """Start another command in a process of its own, with the twin; its end is told as a tick's, without JSON."""
        command = [*self.wrapper, sys.executable, "-c", _TICKER, "-C", str(self.root), *words]
        outputs = self.outside / f"{words[0]}-{time.time_ns()}"
        self._ticks.append(Tick(command, self.environment, outputs))
        return self._ticks[-1]

    def round(self, *words: str, at: str | None = None, root: Path | None = None, **variables: str) -> Ended:
        """Run `al round` to its end. Raises Failure if it shows a traceback."""
        ended = self.start(*words, at=at, root=root, **variables).end()
        expect("Traceback" not in ended.err or ended.code < 0, f"a tick ended with a traceback: {ended.err[-1500:]}")
        return ended

    def run_al(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run another command to its end."""
        command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(self.root), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=TICK_SECONDS)

    def dvc(self, *words: str) -> None:
        """Run a DVC command, as typed by a person; it must succeed."""
        environment = {**self.environment, "PATH": tools_first()["PATH"]}
        done = subprocess.run(["dvc", *words], cwd=self.root, env=environment, capture_output=True, text=True)
        expect(done.returncode == 0, f"dvc {' '.join(words)} ended with {done.returncode}: {done.stderr[-600:]}")

    def al(self, *words: str) -> None:
        """Run another command, which must succeed."""
        with self.start_al(*words):
            pass

    @contextlib.contextmanager
    def start_al(self, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run another command while the block runs; it is waited for at the end of the block."""
        command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(self.root), *words]
        log = self.outside / "al.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env={**self.environment, **variables}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        try:
            yield process
            code = process.wait(TICK_SECONDS)
        finally:
            process.kill()
            process.wait()
        expect(code == 0, f"al {' '.join(words)} ended with {code}: {log.read_text('utf-8', 'replace')[-600:]}")

    def refused(self, code: int, *key_words: str, **more: Any) -> Ended:
        """Run a tick that must end with this exit code and a message that contains all of these words."""
        ended = self.round(**more)
        expect(ended.code == code, f"expected exit code {code}, got {ended.short}")
        for word in key_words:
            expect(word in ended.message, f"expected {word!r} in the message, got {ended.message!r}")
        return ended

    def recover(self) -> Recovery:
        """Tick until the round waits for people again."""
        begin = time.perf_counter()
        ended = None
        for number in range(1, MOST_TICKS + 1):
            ended = self.round()
            if ended.code == 0:
                expect(ended.told["state"] == "open", f"a tick ended well, but the round is {ended.told['state']}")
                return Recovery(number, time.perf_counter() - begin)
        raise Failure(f"not quiet after {MOST_TICKS} ticks: {ended.short if ended else ''}")

    def answer(self) -> None:
        """Between two ticks: people answer all that is open."""
        expect(self.people.answer(self.truth), "nothing is open in Label Studio")

    # What must hold ------------------------------------------------------------------------------------------------

    def check(self, gone: Collection[str] = ()) -> None:
        """All that must hold when nothing is left to do, whatever happened before. Raises Failure.

        `gone`: push keys of tasks that were answered in a deleted project; nobody has to answer them again.
        """
        self.check_results(gone)
        self._check_answers()

    def check_results(self, gone: Collection[str] = ()) -> None:
        """The same after answers were deleted and given again, which changes the ledger but not the results."""
        git, layout = self.git, self.layout
        history = read_history(layout, git)
        records = [history.genesis, *history.rounds]
        for number, (record, wanted) in enumerate(zip(records, self.expected, strict=False)):
            expect(record is not None, "the first build is not committed")
            assert record is not None
            digests = {name: record.hashes[name] for name in LATEST}
            wrong = sorted(name for name in LATEST if digests[name] != wanted[name])
            expect(not wrong, f"record {number - 1}: {', '.join(wrong)} differ from the undisturbed run's")
        plans = [task.push_key for number in range(len(records)) for task in read_plan(git, number)]
        plans = [key for key in plans if key not in gone]
        held = self.people.keys()
        keys = [key for key in held if key not in gone]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        expect(not twice, f"{len(twice)} tasks stand in Label Studio more than once, first {twice[:1]}")
        expect(keys == plans, f"Label Studio holds {len(keys)} tasks, the plans {len(plans)}, or in another order")
        self._check_repository([round_name(number) for number in range(len(history.rounds))])
        self._check_still()
        self._check_nothing_runs()

    def _check_answers(self) -> None:
        """Every answer that was given is there exactly once."""
        layout, events = self.layout, self.events()
        found = Counter((event.annotation_key.split("#")[0], event.annotator, event.label) for event in events)
        wanted = Counter((key, who, label) for (key, who), label in self.people.given.items())
        pulled = {key: count for key, count in wanted.items() if found[key] or self._closed(key[0])}
        expect(
            found == Counter(pulled), f"answers lost: {pulled.keys() - found.keys()}, more: {found - Counter(pulled)}"
        )
        kinds = {event.type for event in events}
        expect(kinds <= {"label", "skip"}, f"events of other kinds than people gave: {sorted(kinds)}")
        expect(not read_refused(layout.events, layout.inbox_events), "good answers were refused")

    def _closed(self, push_key: str) -> bool:
        number = int(push_key.split(":")[1])
        return self.layout.record(number).exists()

    def _check_repository(self, tags: list[str]) -> None:
        git, layout = self.git, self.layout
        status = git.run("status", "--porcelain").stdout
        expect(not status, f"git status is not clean: {status}")
        expect(git.branch() == "main", "the branch is no longer checked out")
        expect(sorted(git.tags()) == tags, f"tags are {sorted(git.tags())}, expected {tags}")
        remote = Git(self.folder / "origin.git")
        expect(remote.run("rev-parse", "main").stdout.strip() == git.head(), "the git remote lacks the newest commit")
        expect(remote.tags() == git.tags(), "the git remote's tags differ")
        site_cache = {"DVC_SITE_CACHE_DIR": self.environment["DVC_SITE_CACHE_DIR"]}
        with Dvc(self.root, None, self.outside / "dvc.log", site_cache) as dvc:
            changed = dvc.changed()
            expect(not changed, f"dvc status is not clean: {changed}")
            missing = [defect.name for defect in dvc.defects_in_remote()]
            expect(not missing, f"the DVC remote lacks {missing}")
        left = [path.name for path in self.root.rglob(".al-tmp-*")]
        expect(not left, f"temporary files are left: {left}")
        expect(not layout.closing.exists(), "the marker of a closing round is left")

    def fingerprint(self) -> tuple[Any, ...]:
        """All that a tick without news must leave unchanged."""
        git, _layout = self.git, self.layout
        return (
            git.head(),
            git.tags(),
            git.run("status", "--porcelain").stdout,
            self.people.keys(),
            self.remembered(),
        )

    def remembered(self) -> tuple[Any, ...]:
        """The content of ledger and inbox."""
        layout = self.layout
        refused = read_refused(layout.events, layout.inbox_events)
        return sha256_tree(layout.events), [event.event_id for event in self.events()], len(refused)

    def events(self) -> list[Event]:
        """All events of ledger and inbox."""
        return read_events(self.layout.events, self.layout.inbox_events)

    def _check_still(self) -> None:
        """Another tick changes nothing."""
        before = self.fingerprint()
        ended = self.round()
        expect(ended.code == 0, f"a tick without news failed: {ended.short}")
        names = ("HEAD", "tags", "git status", "tasks", "answers")
        changed = [name for name, was, now in zip(names, before, self.fingerprint(), strict=True) if was != now]
        expect(not changed, f"a tick without news changed {', '.join(changed)}: {dict(ended.told)}")

    def _check_nothing_runs(self) -> None:
        running = [process.pid for process in self.running()]
        expect(not running, f"processes still run in the workspace: {running}")

    def running(self) -> list[psutil.Process]:
        """Living processes whose folder is in the workspace: DVC and its stages."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                inside = Path(process.cwd()).is_relative_to(self.root)
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # Aiming --------------------------------------------------------------------------------------------------------

    def dvc_process(self) -> psutil.Process | None:
        """The DVC process of the running tick."""
        left = read_json(self.layout.private / "dvc.json")
        try:
            return psutil.Process(left["pid"]) if left else None
        except psutil.NoSuchProcess:
            return None

    def stage_process(self, stage: str) -> psutil.Process | None:
        """The running process of a stage (not the shell around it)."""
        for process in self.running():
            with contextlib.suppress(psutil.Error):
                if process.name() == f"al-{stage}":
                    return process
        return None

    def await_(self, look: Callable[[], Any], tick: Tick, seconds: float = 60.0) -> Any:
        """Poll `look` until it returns something, while the tick lives. Raises Failure."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and tick.process.poll() is None:
            if found := look():
                return found
            time.sleep(0.002)
        tick.kill()
        raise Failure("waited in vain for the moment to strike")

    def clean_up(self) -> None:
        """End what a failed or interrupted scenario left running, and remove the site."""
        for tick in self._ticks:
            if tick.process.poll() is None:
                tick.process.kill()
                tick.process.wait()
        with contextlib.suppress(OSError, ValueError, KeyError):
            child.end_remembered(self.layout.private / "dvc.json")
        for process in self.running():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.outside, ignore_errors=True)


Moment = Literal["before", "after", "during"]


def strike(site: Site, moment: Moment, step: str, time_: int = 1, delay: float = 0.0) -> Ended:
    """Kill a tick at the boundary of a step, or `delay` seconds into it. Raises Failure if it never got there."""
    if moment != "during":
        ended = site.start(at=f"{moment}:{step}:{time_}:die").end()
    else:
        tick = site.start(at=f"before:{step}:{time_}:stop")
        if not tick.stopped():
            ended = tick.end()
            raise Failure(f"the tick never came to {step}: {ended.short}")
        tick.go_on()
        time.sleep(delay)
        ended = tick.kill()
    if moment != "during" or ended.code != 0:
        expect(ended.code == -signal.SIGKILL, f"the tick was not killed {moment} {step}: {ended.short}")
    return ended


@contextlib.contextmanager
def stopped_before(site: Site, step: str, time_: int = 1, *words: str, **variables: str) -> Iterator[Tick]:
    """A tick that has stopped before a step; at the end of the block it continues and is waited for."""
    tick = site.start(*words, at=f"before:{step}:{time_}:stop", **variables)
    if not tick.stopped():
        raise Failure(f"the tick never came to {step}: {tick.end().short}")
    try:
        yield tick
    except BaseException:
        tick.kill()
        raise
