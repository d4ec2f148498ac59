"""`al` for people and for scripts: help, exit codes, one JSON object, nothing of others' that steers a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich._emoji_codes import EMOJI
from rich.console import Console
from typer.main import get_command

from al_pipeline import errors, servers
from al_pipeline.cli import app as cli
from al_pipeline.cli import labelstudio, output
from al_pipeline.cli.options import Invocation, parse_list
from al_pipeline.cli.output import escape, format_time, format_times, spinner, without_markup
from al_pipeline.cli.workspace import shell_path
from al_pipeline.errors import AlError
from al_pipeline.evaluation.figures import Accuracy, Running
from al_pipeline.evaluation.online import Saved
from al_pipeline.integrations.label_studio.probe import ServerStatus
from al_pipeline.operations import connect as connect_module
from al_pipeline.operations import status as status_module
from al_pipeline.operations.status import Status
from al_pipeline.rounds.manifests import NextBatch
from al_pipeline.workspace import workspace as workspace_module
from al_pipeline.workspace.workspace import open_workspace

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Al = Callable[..., Said]


@pytest.fixture
def al(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Al:
    """Runs `al` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(Invocation, "folder", None)

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["al", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Said(stop.value.code, said.out, said.err)

    return run


def commands() -> Iterator[tuple[str, Any]]:
    group: Any = get_command(cli.app)
    for name, command in group.commands.items():
        yield name, command
        for inner, below in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", below


COMMANDS = dict(commands())
TAKES_JSON = [name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: Path | None) -> None:
        raise error

    monkeypatch.setattr(workspace_module, "open_workspace", fail)


def one_object(text: str) -> Any:
    """The one JSON object that is all of `text`."""
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:] == "\n", "nothing but the object"
    assert isinstance(value, dict)
    return value


def test_the_commands_are_those_that_are_promised() -> None:
    promised = {
        "init",
        "doctor",
        "ingest",
        "round",
        "status",
        "rounds",
        "report",
        "predict",
        "simulate",
        "up",
        "down",
        "adopt",
        "schedule",
        "schedule apply",
    }
    assert promised | {"labelstudio"} <= COMMANDS.keys()
    assert {"labelstudio start", "labelstudio stop", "labelstudio invite", "labelstudio connect"} <= COMMANDS.keys()
    groups = {"gold", "labelstudio", "labels", "notify", "remote", "schema", "traffic"}
    assert COMMANDS.keys() - set(TAKES_JSON) == groups, "every command takes --json"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches(al: Al, name: str) -> None:
    said = al(*name.split(), "--help")
    assert said.code == 0 and said.err == ""
    help_text = str(COMMANDS[name].help)
    assert re.match(r"[A-Z].{20,}[.]$", help_text.split("\n\n")[0]), "a whole sentence first"
    assert help_text.split()[0] in said.out
    for paragraph in help_text.split("\n\n"):
        assert "\n" not in paragraph.strip(), "one line a paragraph: the terminal wraps it"
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.name} has no help"


LINES = [
    *(f"{name} {more}" for name in COMMANDS for more in ("--help", "--nonsense")),
    "",
    "--help",
    "--help status",
    "status --help --json",
    "stat",
    "labels",
    "labels revke",
    "-C",
    "-C status",
    "-C . nonsense",
    "--workspace=. status --nonsense",
    "--log-level loud status",
    "-- status --nonsense",
    "--version status",
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_that_is_built_alone_says_what_it_says_among_all(
    al: Al, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    alone = al(*line.split())
    monkeypatch.setattr(cli, "_narrowed", lambda _: cli.app)
    assert al(*line.split()) == alone


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("status --json", "status"),
        ("-C rounds status", "status"),
        ("--workspace=rounds --log-level debug labels revoke", "labels"),
        ("--log-level=debug --workspace /srv/spam round", "round"),
        ("--help status", None),
        ("-Crounds status", None),
        ("-C status", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_the_command_that_is_called_is_known_where_it_is_plain(line: str, name: str | None) -> None:
    built = cli._narrowed(cli._called(line.split()))
    known = [one.name for one in [*built.registered_commands, *built.registered_groups]]
    assert known == (
        [name] if name else [one.name for one in [*cli.app.registered_commands, *cli.app.registered_groups]]
    )


def test_the_overview_wraps_as_prose_and_names_every_exit_code(al: Al, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = al("--help")
    assert al("-h") == said
    text = " ".join(said.out.split())
    assert "al ingest mails.csv, al up (or your own Label Studio), and al round whenever people have labelled" in text
    used = {cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, AlError)}
    for code in used | {0}:
        assert re.search(rf"\b{code} [a-z]", text), f"exit code {code} is not explained"
    prose = said.out[: said.out.index("─ Options")].strip().split("\n")
    lengths = [len(line.strip()) for line in prose if line.strip()]
    assert sum(length < 50 for length in lengths) <= 4, "no lines broken in the middle"


def test_no_command_shows_the_help_once(al: Al) -> None:
    said = al()
    assert said.code == 2
    assert (said.out + said.err).count("Usage:") == 1


@pytest.mark.parametrize("arguments", [["nope"], ["status", "--nope"], ["init"], ["ingest"], ["report", "1", "2"]])
def test_a_wrong_command_line_is_two(al: Al, arguments: list[str]) -> None:
    said = al(*arguments)
    assert said.code == 2 and said.out == ""
    assert "Error: " in said.err and "Traceback" not in said.err
    machine = al(*arguments, "--json")
    assert machine.code == 2
    found = one_object(machine.out)
    assert found["error"] == "UsageError" and found["exit_code"] == 2 and found["message"]


ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, AlError)]
CODES = {"UsageError": 2, "NothingToDo": 3, "Locked": 4, "ExternalServiceError": 5, "ManualActionRequired": 6}


@pytest.mark.parametrize("error", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_is_one_message_and_its_familys_exit_code(
    al: Al, monkeypatch: pytest.MonkeyPatch, error: type[AlError]
) -> None:
    expected = next((CODES[cls.__name__] for cls in error.__mro__ if cls.__name__ in CODES), 1)
    raising(monkeypatch, error("what is wrong; how to fix it"))
    said = al("status")
    assert (said.code, said.out) == (expected, "")
    start = "Nothing done" if error.__name__ == "NothingToDo" else "Error"
    assert said.err == f"{start}: what is wrong; how to fix it\n", "no name of a class before the sentence"
    machine = al("status", "--json")
    assert machine.code == expected
    assert one_object(machine.out) == {
        "error": error.__name__,
        "message": "what is wrong; how to fix it",
        "exit_code": expected,
    }


def test_the_tree_of_errors_is_drawn_whole() -> None:
    drawn = str(errors.__doc__)
    for error in ERRORS:
        line = next(line for line in drawn.splitlines() if re.search(rf"\b{error.__name__}\b", line))
        code = re.search(rf"{error.__name__} +(?:exit code )?(\d)", line)
        assert code is None or int(code.group(1)) == error.exit_code


@pytest.mark.parametrize("name", sorted(set(TAKES_JSON) - {"init", "simulate", "workspaces"}))
def test_outside_a_workspace_every_command_says_so_in_json(al: Al, name: str) -> None:
    needed = {
        "ingest": ["a.csv"],
        "predict": ["a.csv"],
        "drift": ["a.csv"],
        "diff": ["0", "1"],
        "log": ["x"],
        "export": ["-o", "a.csv"],
    }
    needed |= {"labelstudio invite": ["ann@example.org"], "labelstudio connect": ["https://labels.example.org"]}
    needed |= {
        "labelstudio password": ["ann@example.org"],
        "ask": ["x"],
        "check-plugin": ["a:b"],
        "certify": ["--target", "0.9"],
    }
    needed |= {"finish": ["--dry-run"]}
    needed |= {"gold add": ["a.csv"], "gold remove": ["x"], "schema rename": ["a", "b"], "schema retire": ["a"]}
    needed |= {"schema merge": ["a,b", "INTO", "c"], "schema split": ["a", "INTO", "b,c"], "schema add": ["a"]}
    needed |= {"notify remove": ["1"], "traffic delete": ["x"]}
    said = al(*name.split(), *needed.get(name, []), "--json")
    assert said.code == 2
    assert one_object(said.out)["error"] == "NotAWorkspace"
    assert "al init DIR" in said.err


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "writable"),
        (errno.EACCES, "permissions"),
        (errno.EPERM, "permissions"),
        (errno.EIO, "disk"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "ulimit -u"),
    ],
)
def test_a_full_or_locked_disk_is_one_line(al: Al, monkeypatch: pytest.MonkeyPatch, number: int, cure: str) -> None:
    raising(monkeypatch, OSError(number, os.strerror(number), "/data/pool/part-1.parquet"))
    said = al("status")
    assert said.code == 5 and said.out == ""
    assert len(said.err.splitlines()) == 1
    assert os.strerror(number) in said.err and "/data/pool/part-1.parquet" in said.err and cure in said.err
    assert one_object(al("status", "--json").out)["exit_code"] == 5


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad file descriptor"), ValueError("a bug"), KeyError("bug")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    monkeypatch.chdir(tmp_path)
    raising(monkeypatch, error)
    monkeypatch.setattr(sys, "argv", ["al", "status"])
    with pytest.raises(type(error)) as caught:
        cli.main()
    assert caught.value is error


def test_an_interrupt_says_that_nothing_is_lost(al: Al, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    said = al("status")
    assert said.code == 130 and said.out == ""
    assert said.err == "Interrupted; the next `al round` continues where this one stopped.\n"


HOSTILE = "\x1b[31mred\x1b[0m \x9b2J \x07 [bold]loud[/bold] [/] [link=http://evil]here[/link] \u202egnorw \r over"


def steering(text: str) -> list[str]:
    return [character for character in text if not character.isprintable() and character != "\n"]


ACCURACY = Accuracy(
    first_round=1, last_round=3, asked=52, answered=50, right=45, accuracy=0.9, low=0.8, high=0.95
)  # fmt: skip


def found_status() -> Status:
    numbers = dict.fromkeys(("pool", "labelled", "pending", "ignored", "unlabelled", "test", "test_labelled"), 7)
    return Status(
        **numbers,
        workspace=HOSTILE,
        workspace_id="w",
        round=1,
        state="open",
        settled=1,
        tasks=2,
        answers_in_inbox=0,
        incoming=0,
        next=HOSTILE,
        promoted=None,
        promoted_classes=(HOSTILE,),
        metrics=None,
        test_version=HOSTILE,
        labels={HOSTILE: 3},
        refused={HOSTILE: 2},
        sources=(),
        live=None,
        busy={"purpose": HOSTILE, "since": HOSTILE},
        project_id=1,
        label_studio_url=HOSTILE,
        label_studio_page=HOSTILE,
        prefect_url=None,
        traffic=None,
        drift=None,
        running=Running(whole=ACCURACY, recent=ACCURACY),
        saved=Saved(12, 0.9, 26, False),
        proposal=None,
        asked_by=NextBatch(strategy=HOSTILE, reason=HOSTILE),
        paused=None,
        schema_problem=None,
        held=None,
        next_run=None,
        answered=1,
        answered_since=1,
        label_studio=ServerStatus("down", HOSTILE),
        review=None,
        review_page=HOSTILE,
        gold=None,
        cost=None,
        budget=(),
        outlook=None,
    )


def workspace_in(zone: str) -> SimpleNamespace:
    """What the commands use of a workspace if its status is given: the time zone of its schedule."""
    return SimpleNamespace(params=SimpleNamespace(schedule=SimpleNamespace(timezone=zone)))


def test_texts_of_others_do_not_steer_the_terminal(al: Al, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_module, "open_workspace", lambda _: workspace_in("UTC"))
    monkeypatch.setattr(status_module, "status", lambda _: found_status())
    said = al("status")
    assert said.code == 0
    assert steering(said.out) == []
    assert said.out.count("[bold]loud[/bold] [/] [link=http://evil]here[/link]") == 10, "shown as it was written"
    assert said.out.count(', then the button "Label All Tasks"\n') == 1
    assert "running accuracy: 0.900 (0.800–0.950), rounds 1 to 3: 45 of 50 answers predicted correctly" in " ".join(
        said.out.split()
    )
    assert one_object(al("status", "--json").out)["next"] == HOSTILE, "machines get it whole"


@pytest.mark.parametrize(
    ("zone", "stamp", "shown"),
    [
        ("Europe/Berlin", "2026-01-15T23:30:59+00:00", "Fri 2026-01-16 00:30 CET"),
        ("Europe/Berlin", "2026-07-15T22:30:00+00:00", "Thu 2026-07-16 00:30 CEST"),
        ("Europe/Berlin", "2026-07-15T22:30:00.250000-05:00", "Thu 2026-07-16 05:30 CEST"),
        ("UTC", "2026-07-15T22:30:00+02:00", "Wed 2026-07-15 20:30 UTC"),
    ],
)
def test_times_are_shown_in_the_zone_of_the_schedule(zone: str, stamp: str, shown: str) -> None:
    assert format_time(zone, stamp) == shown
    assert format_times(zone, f"paused by Ann at {stamp}: {stamp}.") == f"paused by Ann at {shown}: {shown}."


@pytest.mark.parametrize("text", ["", "2026-13-45T00:00:00+00:00", "0001-01-01T00:00:00+14:00", "2026-01-15", "7"])
def test_what_is_no_time_with_an_offset_stays_as_it_is(text: str) -> None:
    assert format_times("Europe/Berlin", text) == text


def test_status_tells_its_times_to_people_in_their_zone_and_to_machines_in_iso(
    al: Al, monkeypatch: pytest.MonkeyPatch
) -> None:
    since, paused = "2026-07-15T22:30:00+00:00", "paused by Ann at 2026-01-15T23:30:59+00:00: training"
    held, waits = "approved by Bob at 2026-01-16T23:30:59+00:00", f"{paused}; `al resume` ends the pause"
    busy = {"purpose": "al round", "since": since}
    found = replace(found_status(), busy=busy, paused=paused, held=held, next=waits)
    monkeypatch.setattr(workspace_module, "open_workspace", lambda _: workspace_in("Europe/Berlin"))
    monkeypatch.setattr(status_module, "status", lambda _: found)
    lines = al("status").out.splitlines()
    in_berlin = "paused by Ann at Fri 2026-01-16 00:30 CET: training"
    assert {
        "busy: al round since Thu 2026-07-16 00:30 CEST",
        f"paused: {in_berlin}",
        "held: approved by Bob at Sat 2026-01-17 00:30 CET",
        f"next: {in_berlin}; `al resume` ends the pause",
    } <= set(lines)
    machine = one_object(al("status", "--json").out)
    assert (machine["busy"], machine["paused"], machine["held"], machine["next"]) == (busy, paused, held, waits)


def test_an_error_that_repeats_a_hostile_text_does_not_steer_either(al: Al, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, AlError(HOSTILE))
    said = al("status")
    assert steering(said.err) == []
    assert "[bold]loud[/bold]" in said.err
    assert one_object(al("status", "--json").out)["message"] == HOSTILE


def test_classes_that_are_removed_from_the_project_are_named(al: Al, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace_module, "open_workspace", lambda _: None)
    monkeypatch.setattr(connect_module, "reset_page", lambda _: ("novel", "odd"))
    assert one_object(al("labelstudio", "reset", "--json").out) == {"removed_classes": ["novel", "odd"]}
    assert al("labelstudio", "reset").out == "Removed from the project: 'novel', 'odd'.\n"


def test_c_works_in_another_folder(al: Al, tmp_path: Path) -> None:
    said = al("-C", str(tmp_path / "not there"), "status")
    assert said.code == 2 and "not there" in said.err


@pytest.mark.slow
def test_a_workspace_is_made_and_looked_at(al: Al, tmp_path: Path) -> None:
    made = one_object(al("init", "spam", "--labels", "ham, spam", "--json").out)
    assert made["workspace"] == str(tmp_path / "spam")
    assert open_workspace(tmp_path / "spam").id == made["workspace_id"]
    again = al("init", "spam", "--labels", "ham,spam")
    assert again.code == 2 and "is already a workspace" in again.err
    assert "al ingest FILE" in one_object(al("-C", "spam", "status", "--json").out)["next"], "what comes first"
    assert "No round is published yet" in al("-C", "spam", "rounds").out
    (tmp_path / "pool.csv").write_text("id,text\na,one\nb,two\nc,\n", encoding="utf-8")
    (tmp_path / "spam/pool.csv").write_text("id,text\na,one\nb,two\nc,\n", encoding="utf-8")
    took = one_object(al("-C", "spam", "ingest", "pool.csv", "--json").out)
    assert took["added"] == 2
    status = one_object(al("-C", "spam", "status", "--json").out)
    assert {"round", "state", "labelled", "pending", "ignored", "unlabelled", "promoted"} <= status.keys()
    assert status["pool"] + status["test"] == 2 or status["incoming"] == 2
    assert al("-C", "spam", "status").code == 0
    assert one_object(al("-C", "spam", "rounds", "--json").out) == {"rounds": []}
    for arguments, code in (
        (["report"], 3),
        (["report", "7"], 3),
        (["report", "seven"], 2),
        (["predict", "pool.csv"], 3),
        (["predict", "pool.csv", "--round", "0"], 3),
        (["drift", "pool.csv"], 3),
        (["adopt"], 3),
        (["ingest", "nowhere.csv"], 2),
    ):
        said = al("-C", "spam", *arguments)
        assert (said.code, "Traceback" in said.err) == (code, False), (arguments, said)
        assert len(said.err.strip().splitlines()) >= 1
    assert al("-C", "spam", "down").code == 0
    stopped = one_object(al("-C", "spam", "down", "--json").out)["stopped"]
    assert stopped == {"worker": False, "Prefect": False, "Label Studio": False}


def test_the_version_is_the_one_installed(al: Al) -> None:
    assert al("--version").out == f"al {version('al-pipeline')}\n"


TAGS = ["[bold]", "[/]", "[dim]", "[", "]", "\\"]
PIECES = [*TAGS, ":", "12", ":26:", "smile", ":smile:", "-text", "/", "a", "ß", " ", "\n"]


def printed_by_rich(text: str) -> str:
    file = io.StringIO()
    Console(file=file, highlight=False, soft_wrap=True).print(text)
    return file.getvalue()


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_without_rich_a_line_is_what_rich_prints(outside: str) -> None:
    text = f"[bold]round 1[/]: {escape(outside)} [yellow]at 2026-11-29T22:26:26+00:00[/]"
    plain = without_markup(text)
    assert plain is None or f"{plain}\n" == printed_by_rich(text)
    assert plain is not None or not re.fullmatch(r"[\w /]*", outside), "most texts need no Rich"


def test_no_emoji_has_a_name_that_is_printed_without_rich() -> None:
    assert [name for name in EMOJI if without_markup(f"a:{name}: b") is not None] == []


@given(st.lists(st.lists(st.text("ab 1:[\\é\n", max_size=8), min_size=2, max_size=2), max_size=4))
def test_without_rich_a_table_is_what_rich_prints(rows: list[list[str]]) -> None:
    def printed() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("COLUMNS", raising=False)
            patch.setattr(sys, "stdout", io.StringIO())
            output.print_table(("name", "figure"), rows)
            return sys.stdout.getvalue()  # type: ignore[attr-defined]

    usual = printed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_plain_table", lambda *_: [])
        assert printed() == usual


def test_a_long_wait_without_a_terminal_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    with spinner(True) as on_progress:
        for message in ("installing", "installing (10 s)", "installing (20 s)", "starting x (0 s)", "starting x (5 s)"):
            on_progress(message)
    assert capsys.readouterr() == ("", "installing\nstarting x\n")


def test_a_long_wait_in_a_terminal_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with spinner(True) as on_progress:
        for second in range(5):
            on_progress(f"starting [x] ({second} s)")
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") <= 1


def test_a_long_wait_for_machines_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with spinner(False) as on_progress:
        on_progress("installing")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("ham,spam", ["ham", "spam"]),
        (" ham , spam ", ["ham", "spam"]),
        ('"a,b",c', ["a,b", "c"]),
        ('c, "a, ""b"""', ["c", 'a, "b"']),
        ('5" pipe,3" pipe', ['5" pipe', '3" pipe']),
        ("🐟,日本", ["🐟", "日本"]),
        ("a\nb,c", ["a\nb", "c"]),
    ],
)
def test_names_between_commas_are_read_as_csv(typed: str, means: list[str]) -> None:
    if "\n" in typed:
        typed = f'"{typed.split(",")[0]}",c'
    assert parse_list(typed, "--labels") == means


@pytest.mark.parametrize("typed", ['"a,b', '"a"b,c'])
def test_a_quote_that_does_not_end_is_named(typed: str) -> None:
    with pytest.raises(errors.UsageError, match="--labels .* is not a comma-separated list of names"):
        parse_list(typed, "--labels")


@pytest.mark.parametrize("name", ["trec ö 1", "it's; rm -rf", "$HOME", "-x", "a\nb"])
def test_the_next_command_can_be_typed_as_it_stands(name: str) -> None:
    quoted = shell_path(Path(name))
    [word] = shlex.split(quoted)
    assert Path(word) == Path(name) and not word.startswith("-")


def test_init_says_what_people_will_have_to_label_and_what_to_type_next(al: Al) -> None:
    said = al("init", "trec ö 1", "--labels", "ham,spam", "--test-size", "25")
    assert said.code == 0 and said.err == ""
    lines = said.out.splitlines()
    seed = open_workspace(Path("trec ö 1")).params.round.seed_size
    assert lines[1].startswith("From the first file, 25 items (at most a fifth) become the test set (--test-size). ")
    assert f"People label {seed + 25} items before the first model; if you have labels already" in lines[1]
    assert lines[2] == "Next: cd 'trec ö 1', al ingest FILE, al up, al round."


@pytest.mark.parametrize("page", [None, "http://labels.example.org/projects/1/data"])
def test_an_invitation_says_where_and_with_which_button_to_start(
    al: Al, monkeypatch: pytest.MonkeyPatch, page: str | None
) -> None:
    known = SimpleNamespace(credentials=lambda: {"url": "http://labels.example.org"})
    monkeypatch.setattr(workspace_module, "open_workspace", lambda _: known)
    monkeypatch.setattr(labelstudio, "original_workspace", lambda: known)
    monkeypatch.setattr(connect_module, "project_page", lambda _: page)
    monkeypatch.setattr(servers, "invite", lambda *_: SimpleNamespace(password="secret", token="t"))
    url, where = page or "http://labels.example.org", "on the project's page, which `al status` shows once"
    first, second = al("labelstudio", "invite", "ann@example.org").out.splitlines()
    assert first == f"ann@example.org can log in at {url} with the password secret"
    assert second.startswith("and starts there" if page else f"and starts {where}")
    assert second.endswith('with the button "Label All Tasks".')
    machine = one_object(al("labelstudio", "invite", "ann@example.org", "--json").out)
    assert machine == {"email": "ann@example.org", "password": "secret", "token": "t", "page": page}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options_without_anything_heavy(shell: str, tmp_path: Path) -> None:
    def complete(line: str) -> str:
        environment = {
            **os.environ,
            "_AL_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        code = "import sys; sys.argv = ['al']; import atexit; from al_pipeline.cli import app; "
        code += "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); app.main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        heavy = {"torch", "numpy", "pyarrow", "prefect", "dvc", "label_studio_sdk", "httpx", "psutil"}
        assert not set(done.stderr.split()) & heavy
        return done.stdout

    assert {"rollback", "round", "rounds"} <= set(re.findall(r"\w+", complete("al ro")))
    assert "invite" in complete("al labelstudio in")
    assert "--with-folder" in complete("al destroy --w")


def test_the_commands_of_the_overview_are_in_groups(al: Al) -> None:
    said = al("--help").out
    panels = re.findall(r"─ ([A-Z][\w ]+?) ─", said)
    assert panels == ["Options", "Workspace", "Data and labels", "Rounds", "Model", "Servers"]
