"""Standard output and error that are closed, full, left by their reader, or not UTF-8, for every command."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from harness import Played, go_on
from test_cli import COMMANDS, TAKES_JSON

from al_pipeline.cli import app as cli
from al_pipeline.cli import streams
from al_pipeline.cli.options import Invocation
from al_pipeline.data.pool import count_items
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import History, read_history, read_plan
from al_pipeline.operations.init import init
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

FULL = "/dev/full"


@dataclass(frozen=True)
class Ended:
    code: int
    out: bytes
    err: bytes


Open = Callable[[], int | None]


def _left() -> int:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _full() -> int:
    return os.open(FULL, os.O_WRONLY)


def _closed() -> None:
    return None


def run(
    *arguments: str,
    out: Open | None = None,
    err: Open | None = None,
    encoding: str = "utf-8",
    errors: str = "strict",
    stdin_closed: bool = False,
    folder: Path | None = None,
    **environment: str,
) -> Ended:
    """`al` in a child that begins as a new Python would, with these two streams (None: both are kept and returned)."""
    with tempfile.TemporaryFile() as kept_out, tempfile.TemporaryFile() as kept_err:
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(environment)
                if folder is not None:
                    os.chdir(folder)
                for number, opened, kept in ((1, out, kept_out), (2, err, kept_err)):
                    descriptor = kept.fileno() if opened is None else opened()
                    if descriptor is None:
                        os.close(number)
                    else:
                        os.dup2(descriptor, number)
                sys.stdin = open(os.devnull)  # noqa: SIM115
                if stdin_closed:
                    os.close(0)
                    sys.stdin = sys.__stdin__ = None  # type: ignore[assignment,misc]
                for number, name in ((1, "stdout"), (2, "stderr")):
                    stream = None
                    if (out, err)[number - 1] is not _closed:
                        raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
                        stream = io.TextIOWrapper(raw, encoding, errors if number == 1 else "backslashreplace")
                    setattr(sys, name, stream)
                    setattr(sys, f"__{name}__", stream)
                sys.argv = ["al", *arguments]
                Invocation.folder = None
                try:
                    cli.main()
                except SystemExit as stop:
                    os._exit(stop.code if isinstance(stop.code, int) else 99)
            finally:
                os._exit(98)  # a traceback
        _, status = os.waitpid(child, 0)
        kept_out.seek(0)
        kept_err.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), kept_out.read(), kept_err.read())


FAILS_OUTSIDE = [name for name in TAKES_JSON if name != "workspaces"]
"""Commands that need a workspace, or words."""
BROKEN: dict[str, Open] = {"full": _full, "closed": _closed, "left": _left}
LOST_CODE = {"full": 5, "closed": 5, "left": 141}
NEEDED = {
    **{"ingest": ["a.csv"], "predict": ["a.csv"], "drift": ["a.csv"], "diff": ["0", "1"], "log": ["x"]},
    **{"labelstudio invite": ["ann@example.org"], "labelstudio connect": ["https://labels.example.org"]},
    **{"gold add": ["a.csv"], "gold remove": ["x"], "schema rename": ["a", "b"], "schema retire": ["a"]},
    **{"schema merge": ["a,b", "INTO", "c"], "schema split": ["a", "INTO", "b,c"], "schema add": ["a"]},
    **{
        "labelstudio password": ["ann@example.org"],
        "traffic delete": ["x"],
        "init": ["not a new\nfolder", "--labels", "a"],
        "simulate": ["no"],
    },
}


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """One that people named in their own letters."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("streams")
        patch.setenv("AL_HOME", str(folder / "home"))
        yield init(folder / "trec ö 1", ["größe", "日本", "🐟"], "Größe? 🐟")


@pytest.mark.parametrize(("name", "how"), [*(("", how) for how in BROKEN), *((name, "full") for name in COMMANDS)])
def test_help_that_cannot_be_shown_is_no_traceback(empty: Path, name: str, how: str) -> None:
    ended = run(*name.split(), "--help", out=BROKEN[how], folder=empty)
    assert ended.code == LOST_CODE[how]
    assert b"Traceback" not in ended.err
    assert (b"could not be written" in ended.err) == (how != "left"), "a reader that went away knows it"


@pytest.mark.parametrize(("name", "how"), [*zip(FAILS_OUTSIDE, itertools.cycle(BROKEN), strict=False)])
def test_an_error_keeps_its_exit_code_wherever_output_leads(empty: Path, name: str, how: str) -> None:
    words = [*name.split(), *NEEDED.get(name, []), "--json"]
    plain = run(*words, folder=empty)
    assert plain.code == 2 and json.loads(plain.out)["exit_code"] == 2
    for streams_ in ({"err": BROKEN[how]}, {"out": BROKEN[how], "err": BROKEN[how]}):
        ended = run(*words, folder=empty, **streams_)  # type: ignore[arg-type]
        assert ended.code == plain.code
        assert b"Traceback" not in ended.err
        if "out" not in streams_:
            assert ended.out == plain.out


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in cli.READ_ONLY])
def test_every_command_either_shows_or_does(name: str) -> None:
    does = "init ingest round report simulate reproduce upgrade schedule up down trust rollback labels approve pause"
    does += " resume adopt labelstudio ask export remote destroy review gold schema notify serve live traffic certify"
    does += " finish"
    assert name.split()[0] in does.split(), "add it to `READ_ONLY`, or here"


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["rounds"], ["rounds", "--json"]])
def test_what_cannot_be_shown_is_said_to_have_failed(workspace: Workspace, how: str, words: list[str]) -> None:
    ended = run(*words, out=BROKEN[how], folder=workspace.layout.root)
    assert ended.code == LOST_CODE[how]
    assert b"Traceback" not in ended.err
    assert (b"could not be written" in ended.err) == (how != "left")
    assert run(*words, out=BROKEN[how], err=BROKEN[how], folder=workspace.layout.root).code == LOST_CODE[how]
    assert run(*words, err=BROKEN[how], folder=workspace.layout.root).code == 0


@pytest.mark.parametrize("json_", [(), ("--json",)])
@pytest.mark.parametrize("how", BROKEN)
def test_what_was_done_is_done(workspace: Workspace, tmp_path: Path, how: str, json_: tuple[str, ...]) -> None:
    """The exit code speaks of the work, not of the terminal."""
    root, nowhere = workspace.layout.root, BROKEN[how]
    for on, err in ((True, None), (False, nowhere)):
        words = ["schedule", "--on" if on else "--off", *json_]
        assert run(*words, out=nowhere, err=err, folder=root).code == 0
        assert yaml.safe_load(workspace.layout.params.read_text("utf-8"))["schedule"]["active"] is on
    made = tmp_path / "made"
    assert run("init", str(made), "--labels", "a,b", *json_, out=nowhere, err=nowhere, folder=tmp_path).code == 0
    assert read_json(made / "al-workspace.json")["workspace_id"]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"id": f"{n}", "text": f"text {n}"}) + "\n" for n in range(600)))
    ended = run("ingest", str(pool), *json_, out=nowhere, folder=made)
    assert ended.code == 0 and b"Traceback" not in ended.err
    if how != "left":
        assert b"the command itself succeeded" in ended.err
    assert count_items([made / "data/inbox/pool", made / "data/inbox/test"]) == 600


@pytest.fixture
def published(once: Played, tmp_path: Path) -> Path:
    """A workspace with a published round; its Label Studio is gone."""
    return go_on(once, tmp_path)[0].layout.root


@pytest.mark.slow
def test_what_was_done_to_a_published_round_is_done(published: Path, tmp_path: Path) -> None:
    layout = Layout(published)

    def history() -> History:
        return read_history(layout, Git(published))

    def done(*words: str, how: str) -> None:
        ended = run(*words, out=BROKEN[how], folder=published)
        assert ended.code == 0 and b"Traceback" not in ended.err, (words, how, ended.err)
        assert b"the command itself succeeded" in ended.err

    before = history().rounds[-1].counts.labelled
    for how in ("full", "closed"):
        done("export", "-o", str(tmp_path / f"{how}.csv"), how=how)
        assert len((tmp_path / f"{how}.csv").read_text(encoding="utf-8").splitlines()) == 1 + before
        done("pause", "--reason", "größe", how=how)
        pausing = history().pausing
        assert pausing is not None and pausing.reason == "größe"
        done("resume", "--json", how=how)
        assert history().pausing is None
    item = read_plan(Git(published), 0)[0].item_id
    done("labels", "revoke", "--item", item, how="full")
    assert [record.round for record in history().rounds] == [0, 1]
    assert [one.kind for one in history().interventions][-1] == "revoke" and not history().waiting


ENCODINGS = [
    ("latin-1", "strict"),
    ("ascii", "strict"),
    ("ascii", "surrogateescape"),
    ("cp1252", "strict"),
    ("utf-16", "strict"),
]


@pytest.mark.parametrize(("encoding", "errors"), ENCODINGS)
def test_machine_output_is_utf_8_always(workspace: Workspace, encoding: str, errors: str) -> None:
    root = workspace.layout.root
    plain = run("status", "--json", folder=root)
    assert plain.code == 0 and json.loads(plain.out.decode("utf-8"))["workspace"] == str(root)
    assert run("status", "--json", folder=root, encoding=encoding, errors=errors).out == plain.out
    shown = run("status", folder=root, encoding=encoding, errors=errors)
    assert shown.code == 0 and b"Traceback" not in shown.err and shown.out.decode(encoding)
    for words in (["--help"], ["schedule"]):
        ended = run(*words, folder=root, encoding=encoding, errors=errors)
        assert ended.code in (0, 6) and b"Traceback" not in ended.err
        assert ended.out.decode(encoding)
    wrong = run("log", "größe", "--json", folder=root, encoding=encoding, errors=errors)
    assert wrong.code in (2, 3) and "größe" in json.loads(wrong.out.decode("utf-8"))["message"]


@pytest.mark.slow
def test_predictions_and_the_report_of_a_tick_are_utf_8_always(published: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\ngröße 🐟,日本 win money now\n", encoding="utf-8")
    assert run("pause", "--reason", "größe 🐟", folder=published).code == 0
    for words, code in (
        (["predict", str(tmp_path / "in.csv"), "--round", "0", "--columns"], 0),
        (["predict", str(tmp_path / "in.csv"), "--round", "0", "--columns", "--format", "csv"], 0),
        (["round", "--json"], 3),
    ):
        plain = run(*words, folder=published)
        assert plain.code == code and "größe 🐟" in plain.out.decode("utf-8"), plain
        for encoding, errors in ENCODINGS:
            found = run(*words, folder=published, encoding=encoding, errors=errors)
            assert (found.code, found.out) == (code, plain.out), (words, encoding)


def test_signs_of_ours_are_plain_where_a_terminal_has_none(workspace: Workspace) -> None:
    said = run("doctor", folder=workspace.layout.root, encoding="ascii").out.decode("ascii")
    assert "\n+ " in said or said.startswith("+ "), "a tick as a plus, no \\u2713"
    assert "\\u2713" not in said


def test_a_closed_standard_input_is_an_empty_one(workspace: Workspace) -> None:
    ended = run("labelstudio", "connect", "http://127.0.0.1:9", folder=workspace.layout.root, stdin_closed=True)
    assert ended.code == 5 and b"token" in ended.err and b"Traceback" not in ended.err


def test_what_is_opened_later_never_lies_under_a_closed_stream(tmp_path: Path) -> None:
    """Else a child's words would go into a lock or a database of ours."""
    child = os.fork()
    if child == 0:
        for number in (0, 1, 2):
            os.close(number)
        sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None  # type: ignore[assignment,misc]
        streams.guard()
        with (tmp_path / "file").open("w") as file:
            print("into nothing")  # noqa: T201
            os._exit(file.fileno())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) > 2


@pytest.mark.parametrize("columns", ["1", "20", "60"])
def test_a_narrow_terminal_loses_no_figure(workspace: Workspace, columns: str) -> None:
    for words in (["rounds"], ["--help"]):
        ended = run(*words, folder=workspace.layout.root, COLUMNS=columns)
        assert ended.code in (0, 6) and b"Traceback" not in ended.err
    said = run("status", folder=workspace.layout.root, COLUMNS=columns).out.decode()
    for name in ("pool", "unlabelled", "pending"):
        assert name in " ".join(said.split()), "words are whole"


def test_in_a_file_a_line_is_a_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = run("status", folder=workspace.layout.root).out.decode().splitlines()
    header = next(line for line in lines if line.startswith("pool"))
    assert " ".join(header.split()) == "pool labelled pending ignored unlabelled test set test set labelled"
    assert not any("\x1b" in line for line in lines)


def test_no_color_is_obeyed_in_a_terminal(workspace: Workspace) -> None:
    colored = {}
    for word in ("", "1"):
        reader, terminal = pty.openpty()
        ended = run(
            "status", out=lambda terminal=terminal: terminal, folder=workspace.layout.root, NO_COLOR=word, TERM="xterm"
        )  # type: ignore[misc]
        assert ended.code == 0
        colored[word] = os.read(reader, 65536)
        os.close(reader)
        os.close(terminal)
    assert b"\x1b[" in colored[""]
    assert b"\x1b[3" not in colored["1"], "no color"
