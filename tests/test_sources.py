"""Files of `ingest.sources`: each on its own, none while it is still being written, and what fails is told."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import socket
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from harness import answer_all, change_params, small_workspace
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_ingest import events, labels, make_workspace, pool, test_set, write

from al_pipeline.errors import UnusableFile
from al_pipeline.files import write_json
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import ingest as ingest_module
from al_pipeline.operations import sources as module
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.ingestion.patterns import find_sources
from al_pipeline.operations.ingestion.source_states import QUIET_SECONDS, source_news
from al_pipeline.operations.sources import ingest_sources
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace


def with_params(space: Workspace, **changes: str) -> Workspace:
    text = space.layout.params.read_text()
    for name, value in changes.items():
        before = next(line for line in text.splitlines() if line.startswith(f"  {name}:"))
        text = text.replace(before, f"  {name}: {value}")
    space.layout.params.write_text(text)
    return open_workspace(space.layout.root)


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """A workspace whose sources are all files in `incoming/`."""
    made = with_params(make_workspace(tmp_path / "ws"), sources="['incoming/*']")
    (made.layout.root / "incoming").mkdir()
    return made


def incoming(space: Workspace) -> Path:
    return space.layout.root / "incoming"


def later(seconds: float = 2 * QUIET_SECONDS) -> float:
    """A tick's time, by which what was just written is quiet."""
    return time.time() + seconds


def ids(space: Workspace) -> list[str]:
    return [item.item_id for item in pool(space)]


# Quiet --------------------------------------------------------------------------------------------------------------
def test_a_file_is_read_once_it_has_been_quiet_for_a_minute(space):
    file = write(incoming(space) / "new.csv", "id,text", "a,only the beg")
    added, told = ingest_sources(space)
    assert (added, ids(space)) == (0, [])
    (line,) = told
    assert line.startswith("ingest.sources: incoming/new.csv changed 0 s ago; it is read once it has not changed for")
    assert [one.state for one in source_news(space.layout)] == ["waiting"]
    write(file, "id,text", "a,only the beginning was there", "b,and now all of it is")
    assert ingest_sources(space, later(30))[0] == 0
    assert ingest_sources(space, later()) == (2, [])
    assert [item.text for item in pool(space)] == ["only the beginning was there", "and now all of it is"]
    assert source_news(space.layout) == []


@pytest.mark.parametrize("how", ["append", "cp -p", "mv", "replace"])
def test_times_that_were_set_back_do_not_hide_a_copy_under_way(space, tmp_path, how):
    """`cp -p` and `rsync -t` set the time of the original; the kernel's own time of change cannot be set."""
    file = incoming(space) / "new.csv"
    if how == "mv":
        os.utime(write(tmp_path / "other.csv", "id,text", "a,half"), (0, 0))
        (tmp_path / "other.csv").rename(file)
    else:
        os.utime(write(file, "id,text", "a,half"), (0, 0))
    assert ingest_sources(space)[0] == 0
    if how == "append":
        with file.open("a") as out:
            out.write("b,more\n")
    elif how == "replace":
        write(tmp_path / "other.csv", "id,text", "a,half", "b,more").rename(file)
    else:
        write(file, "id,text", "a,half", "b,more")
    os.utime(file, (0, 0))
    assert ingest_sources(space)[0] == 0
    assert ingest_sources(space, later())[0] == 2


def test_times_in_the_future_and_clocks_set_back_cost_a_minute_and_no_more(space):
    file = write(incoming(space) / "new.csv", "text", "hello")
    os.utime(file, (4e9, 4e9))
    now = time.time()
    assert ingest_sources(space, now)[0] == 0
    assert ingest_sources(space, now + 30)[0] == 0
    assert ingest_sources(space, now - 1e6)[0] == 0, "the clock was set back"
    assert ingest_sources(space, now - 1e6 + 30)[0] == 0
    assert ingest_sources(space, now - 1e6 + QUIET_SECONDS)[0] == 1


def test_a_file_that_is_written_to_all_the_time_says_how_it_is_read(space):
    file = write(incoming(space) / "log.csv", "text", "hello")
    now = time.time()
    for minute in range(0, 180, 30):
        with file.open("a") as out:
            out.write(f"line {minute}\n")
        os.utime(file, (now + 60 * minute, now + 60 * minute))
        added, (line,) = ingest_sources(space, now + 60 * minute)
        assert added == 0
    assert "but it has kept changing for 2 h: `al ingest` reads it at once" in line
    assert ingest(space, [file]).added == 7


@pytest.mark.parametrize("by", ["tick", "hand"])
@pytest.mark.parametrize("how", ["grown", "cut", "replaced", "same size", "gone"])
def test_a_file_that_changes_while_it_is_read_is_not_taken_in(space, tmp_path, monkeypatch, by, how):
    file = write(incoming(space) / "new.csv", "id,text", *(f"{n},text {n}" for n in range(50)), "z,")
    other = write(tmp_path / "other.csv", "id,text", "a,b")
    read = ingest_module.read_blocks

    def meanwhile(*arguments, **more):
        yield from read(*arguments, **more)
        time.sleep(0.02)  # longer than the steps of the kernel's clock
        match how:
            case "grown":
                write(file, file.read_text(), "more,text")
            case "cut":
                os.truncate(file, 20)
            case "replaced":
                other.rename(file)
            case "same size":
                file.write_bytes(file.read_bytes().replace(b",text", b",TEXT").replace(b"id,TEXT", b"id,text"))
            case _:
                file.unlink()

    monkeypatch.setattr(ingest_module, "read_blocks", meanwhile)
    if by == "hand":
        with pytest.raises(UnusableFile, match="changed while it was read; nothing was added"):
            ingest(space, [file])
    else:
        added, told = ingest_sources(space, later())
        assert added == 0
        assert len(told) == 1
        assert ("was not ingested" if how == "gone" else "changed 0 s ago; it is read once") in told[0]
        assert [one.state for one in source_news(space.layout)] == ["failing" if how == "gone" else "waiting"]
    assert ids(space) == []
    assert not space.layout.rejects.exists(), "nothing of what was read is kept"
    monkeypatch.undo()
    if how != "gone":
        assert ingest_sources(space, later(300))[0] > 0


def test_a_file_that_changes_between_the_look_and_the_reading_waits(space, monkeypatch):
    file = write(incoming(space) / "new.csv", "text", "half")
    digest = module.digest_of

    def meanwhile(source):
        found = digest(source)
        time.sleep(0.02)
        write(file, "text", "half of it")
        return found

    monkeypatch.setattr(module, "digest_of", meanwhile)
    assert ingest_sources(space, later())[0] == 0
    assert [one.state for one in source_news(space.layout)] == ["waiting"]
    monkeypatch.undo()
    assert ingest_sources(space, later(300))[0] == 1
    assert [item.text for item in pool(space)] == ["half of it"]


# What is remembered -------------------------------------------------------------------------------------------------
def test_what_was_taken_in_is_not_opened_again(space, monkeypatch):
    write(incoming(space) / "a.csv", "text", "hello")
    assert ingest_sources(space, later())[0] == 1
    memory = space.layout.private / "ingested.json"
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    before = memory.read_bytes()
    monkeypatch.setattr(module, "digest_of", lambda _: pytest.fail("read again"))
    assert ingest_sources(space, later()) == (0, [])
    assert memory.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"files": 3}',
        b'{"files": {"incoming/a.csv": {"state": "taken"}}, "drawn_from": "x"}',
        b'{"files": {"incoming/a.csv": {"state": "waiting", "stamp": 1}}}',
        b'{"files": {"incoming/a.csv": {"state": "failing", "message": "", "failing_since": 1e300}}}',
        b'{"incoming/a.csv": "another digest"}',
        None,
    ],
)
def test_a_lost_memory_costs_a_second_reading_alone(space, damage):
    write(incoming(space) / "a.csv", "id,text", "x,hello")
    assert ingest_sources(space, later())[0] == 1
    memory = space.layout.private / "ingested.json"
    whole = json.loads(memory.read_text())
    memory.unlink()
    if damage is not None:
        memory.write_bytes(damage)
    source_news(space.layout)
    assert ingest_sources(space, later()) == (0, [])
    assert ids(space) == ["x"]
    assert json.loads(memory.read_text())["files"].keys() == whole["files"].keys()


def test_the_memory_of_an_earlier_version_is_understood(space, monkeypatch):
    file = write(incoming(space) / "a.csv", "text", "hello")
    assert ingest_sources(space, later())[0] == 1
    memory = space.layout.private / "ingested.json"
    digest = json.loads(memory.read_text())["files"]["incoming/a.csv"]["digest"]
    write_json(memory, {"incoming/a.csv": digest, "incoming/gone.csv": digest})
    monkeypatch.setattr(ingest_module, "ingest", lambda *_, **__: pytest.fail("read again"))
    assert ingest_sources(space, later()) == (0, [])
    os.utime(file)
    assert ingest_sources(space, later()) == (0, []), "touched, and the same content"


def test_other_settings_have_files_read_again_in_the_order_in_which_they_came(space):
    write(incoming(space) / "b.csv", "id,text,label", "x,hello,ham", "y,bye,ham")
    assert ingest_sources(space, later())[0] == 2
    write(incoming(space) / "a.csv", "id,text,label", "x,hello,spam")
    assert ingest_sources(space, later())[0] == 0
    assert events(space) == []
    space = with_params(space, label_column="label")
    ingest_sources(space, later())
    assert labels(space) == {"x": "spam", "y": "ham"}, "a.csv came later"
    space.layout.private.joinpath("ingested.json").touch()
    count = len(events(space))
    assert ingest_sources(space, later()) == (0, [])
    assert len(events(space)) == count


# Rejected rows ------------------------------------------------------------------------------------------------------
def test_rejected_rows_and_texts_that_have_changed_are_counted_once(space):
    write(incoming(space) / "a.csv", "id,text", "x,hello", "y,cut o", "z,")
    _, (line,) = ingest_sources(space, later())
    assert line.startswith("ingest.sources: incoming/a.csv: 1 row rejected; each with its reason: ")
    write(incoming(space) / "a.csv", "id,text", "x,hello", "y,cut off no longer", "z,", "u,")
    added, (cut, texts, rows) = ingest_sources(space, later())
    assert added == 0
    assert cut.startswith("ingest.sources: incoming/a.csv: 1 text with a known id continues the text in the pool")
    assert (
        "incoming/a.csv: 1 item has a different text than before under the same id. The pool keeps the first" in texts
    )
    assert "`al ingest incoming/a.csv --corrections` replaces it by the new one" in texts
    assert not any(event.type == "correct" for event in events(space)), "a tick accepts none by itself"
    assert "2 rows rejected" in rows
    assert ingest_sources(space, later()) == (0, [])
    assert [item.text for item in pool(space)] == ["hello", "cut o"]


def test_what_was_guessed_of_a_file_and_labels_not_taken_are_told(space):
    space = with_params(space, label_column="label")
    (incoming(space) / "a.csv").write_bytes("id,text,label\nx,Schöne Grüße aus Köln,eggs\n".encode("cp1252"))
    added, (guess, label) = ingest_sources(space, later())
    assert added == 1
    assert guess.startswith("ingest.sources: incoming/a.csv: is not UTF-8; read as cp1252")
    assert "incoming/a.csv: 1 label not used" in label


# What is no file, and settings --------------------------------------------------------------------------------------
def test_a_source_that_cannot_be_used_stops_no_other(space):
    folder = incoming(space)
    (folder / "a.csv").touch()
    (folder / "._x.csv").write_bytes(b"\0\5\x16\7")
    (folder / "b.parquet").write_bytes(b"PAR1half")
    (folder / "c.csv.gz").write_bytes(gzip.compress(b"text\nlost\n", mtime=0)[:-5])
    Path(os.fsdecode(os.fsencode(folder) + b"/d\xe9.csv")).write_text("text\nfrom a name that is not UTF-8\n")
    write(folder / "e.csv", "text", "good", '" "')
    now = later()
    added, problems = ingest_sources(space, now)
    assert added == 2
    assert len(problems) == 4
    assert ingest_sources(space, now + 7200)[0] == 0
    failing = source_news(space.layout)
    assert [one.file for one in failing] == ["incoming/a.csv", "incoming/b.parquet", "incoming/c.csv.gz"]
    assert all(one.state == "failing" and abs(one.since.timestamp() - now) < 1 for one in failing)
    write(folder / "a.csv", "text", "now good")
    (folder / "b.parquet").unlink()
    assert ingest_sources(space, later(now + 7200 - time.time() + 120))[0] == 1
    assert [one.file for one in source_news(space.layout)] == ["incoming/c.csv.gz"]


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_told_and_never_waited_for(space, tmp_path):
    folder = incoming(space)
    os.mkfifo(folder / "fifo.csv")
    (folder / "gone.csv").symlink_to(folder / "never.csv")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    (folder / "zero.csv").symlink_to("/dev/zero")
    (folder / "outside.csv").symlink_to(write(tmp_path / "outside.csv", "text", "somebody else's"))
    (folder / "folder.csv").mkdir()
    (folder / "own.parquet").symlink_to(space.layout.params)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket.csv")
        os.chdir(here)
    write(folder / "link's target.csv", "text", "good")
    (folder / "link.csv").symlink_to("link's target.csv")
    added, _ = ingest_sources(space, later())
    assert added == 1
    assert {one.file.removeprefix("incoming/"): one.message for one in source_news(space.layout)} == {
        "fifo.csv": "is not a regular file, but a pipe, a socket or a device",
        "gone.csv": "is a link to a file that does not exist",
        "loop.csv": "is a link to a file that does not exist",
        "outside.csv": "is a link that leads outside the workspace; copy the file into it",
        "socket.csv": "is not a regular file, but a pipe, a socket or a device",
        "zero.csv": "is a link that leads outside the workspace; copy the file into it",
    }


@pytest.mark.parametrize(
    "pattern",
    [
        *("/etc/passwd", "/etc", "../x.csv", "../../x", "incoming/../../*.csv", "..", "~/x.csv", "~/.ssh", "/**", "//"),
        *("a\0b.csv", "a\nb.csv", "a\x1b[31m", "\u202e.csv"),
    ],
)
def test_a_pattern_that_leads_out_of_the_workspace_stops_no_other(space, tmp_path, pattern):
    write(tmp_path / "x.csv", "text", "not ours")
    space = with_params(space, sources=json.dumps([pattern, "incoming/*.csv"]))
    write(incoming(space) / "a.csv", "text", "good")
    added, told = ingest_sources(space, later())
    (news,) = source_news(space.layout)
    assert added == 1
    assert news.state == "failing"
    assert news.message == "is not a path below the workspace; copy the files into it"
    assert news.file == pattern or not pattern.isprintable()
    assert news.file.isprintable()
    assert told == [f"ingest.sources: {news.file} {news.message}"]


def test_a_folder_and_a_file_without_permission_are_told(space, monkeypatch):
    space = with_params(space, sources="['incoming/**/*.csv']")
    write(incoming(space) / "good.csv", "text", "good")
    write(incoming(space) / "bad.csv", "text", "bad").chmod(0)
    (incoming(space) / "closed").mkdir(mode=0)
    if os.geteuid() == 0:  # who may read everything

        def as_others(act):
            def refusing(path, *more, **others):
                if isinstance(path, str | os.PathLike) and os.path.exists(path) and not os.stat(path).st_mode & 0o400:
                    raise PermissionError(13, "Permission denied")
                return act(path, *more, **others)

            return refusing

        monkeypatch.setattr(os, "open", as_others(os.open))
        monkeypatch.setattr(os, "scandir", as_others(os.scandir))
    try:
        assert ingest_sources(space, later())[0] == 1
        assert [one.file for one in source_news(space.layout)] == ["incoming/bad.csv", "incoming/closed"]
    finally:
        (incoming(space) / "closed").chmod(0o700)


def test_a_file_that_cannot_be_opened_or_read_stops_no_other(space, monkeypatch):
    for name in ("a.csv", "b.csv", "z.csv"):
        write(incoming(space) / name, "text", name)
    open_, digest = os.open, hashlib.file_digest

    def opened(path, *more, **others):
        if path == incoming(space) / "a.csv":
            raise PermissionError(13, "Permission denied")
        return open_(path, *more, **others)

    def digested(file, name):
        if os.readlink(f"/proc/self/fd/{file.fileno()}").endswith("b.csv"):
            raise OSError(5, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(hashlib, "file_digest", digested)
    added, told = ingest_sources(space, later())
    assert added == 1
    assert told == [
        "ingest.sources: incoming/a.csv was not ingested: incoming/a.csv cannot be read: Permission denied",
        "ingest.sources: incoming/b.csv was not ingested: incoming/b.csv cannot be read: Input/output error",
    ]


def test_a_folder_that_cannot_be_listed_stops_no_other(space, monkeypatch):
    space = with_params(space, sources="['incoming/**/*.csv']")
    write(incoming(space) / "good.csv", "text", "good")
    (incoming(space) / "closed").mkdir()
    scan = os.scandir

    def scandir(path):
        if path == incoming(space) / "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    added, told = ingest_sources(space, later())
    assert added == 1
    assert told == ["ingest.sources: incoming/closed cannot be listed: Permission denied"]


def test_patterns_find_no_hidden_and_none_of_the_engines_own_files(space):
    root = space.layout.root
    layout = space.layout
    wanted = ["top.csv", "data/mails.csv", "deep/er/x.csv"]
    others = [".hidden.csv", ".cache/x.csv", "deep/.venv/x.csv", ".git/x.csv", ".al/x.csv", "rounds/0000/x.csv"]
    others += [
        "reports/x.csv",
        "data/rejects/x.csv",
        "data/inbox/pool/x.csv",
        "data/pool/x.csv",
        "models/candidate/x.csv",
    ]
    for name in (*wanted, *others):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, "text", name)
    (root / "deep/circle").symlink_to(root)

    def found(*patterns):
        sources = find_sources(layout, patterns)
        return sorted(path.relative_to(root).as_posix() for path in sources.files), sources.problems

    assert found("**/*.csv") == (sorted(wanted), {})
    assert found("**") == (sorted([*wanted]), {})
    assert found("**/**/x.csv", "**/deep/**/x.csv") == (["deep/er/x.csv"], {})
    assert found("*/*.csv") == (["data/mails.csv"], {})
    assert found("./data//*.csv") == (["data/mails.csv"], {})
    assert found("deep/.venv/*.csv", ".hidden.csv", ".h*.csv") == ([".hidden.csv", "deep/.venv/x.csv"], {})
    assert found("rounds/0000/x.csv")[1] == {
        "rounds/0000/x.csv": "belongs to the workspace itself and cannot be a source"
    }
    assert found("data")[1] == {"data": "is a folder; to read its files, append `/*`"}
    assert found("no/never.csv")[1] == {"no/never.csv": "cannot be read: No such file or directory"}
    for pattern in ("**x", "[", "[]", "[!", "***", "a/**b/c", "/", ".", "x" * 100_000, "**/" * 200 + "x.csv"):
        found(pattern)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoding": "klingon"}, "unknown encoding 'klingon'"),
        ({"label_column": "text"}, "ingest.text_column and ingest.label_column are both 'text'"),
        ({"text_column": "body"}, "has no column `body`"),
        ({"encoding": "utf-16"}, "incoming/a.csv"),
    ],
)
def test_settings_that_fit_no_file_are_told_and_raise_nothing(space, changes, says):
    file = write(incoming(space) / "a.csv", "text,label", "hello,ham")
    wrong = with_params(space, **changes)
    added, told = ingest_sources(wrong, later())
    assert added == 0
    assert len(told) == 1 and says in told[0]
    assert len(source_news(space.layout)) == 1
    right = with_params(space, encoding='""', label_column="label", text_column="text")
    assert ingest_sources(right, later()) == (1, [])
    assert source_news(space.layout) == []
    assert file.exists()


def test_thousands_of_bad_files_are_a_few_lines(space):
    for number in range(200):
        (incoming(space) / f"{number:03d}.csv").symlink_to("nowhere")
    _, told = ingest_sources(space, later())
    assert len(told) == module.MAX_LINES + 1
    assert told[-1] == "ingest.sources: and 180 lines like these; `al doctor` shows them"


@pytest.mark.slow
def test_what_is_wrong_with_sources_stops_no_answer_and_stands_in_status_and_doctor(tmp_path):
    space, truth = small_workspace(
        tmp_path, changes={"sources: []": "sources: [/etc/*, 'in/*']", 'encoding: ""': "encoding: klingon"}
    )
    oracle = SimulatedOracle()
    tick(space, lambda: oracle)
    answered = answer_all(oracle, truth)
    folder = space.layout.root / "in"
    folder.mkdir()
    os.mkfifo(folder / "fifo.csv")
    (folder / "gone.csv").symlink_to("nowhere")
    report = tick(open_workspace(space.layout.root), lambda: oracle)
    assert report.pulled == {"label": answered}
    assert [
        line for line in report.warnings if "ingest.sources: params.yaml stops all sources: unknown encoding" in line
    ]
    change_params(space, {"encoding: klingon": 'encoding: ""'})
    write(folder / "new.csv", "text", "hello")
    space = open_workspace(space.layout.root)
    report = tick(space, lambda: oracle)
    assert [line.split()[1] for line in report.warnings] == ["/etc/*", "in/fifo.csv", "in/gone.csv", "in/new.csv"]
    found = status(space).sources
    assert [(one.file, one.state) for one in found] == [
        ("/etc/*", "failing"), ("in/fifo.csv", "failing"), ("in/gone.csv", "failing"), ("in/new.csv", "waiting"),
    ]  # fmt: skip
    assert found[0].since > datetime.now(UTC) - timedelta(minutes=10)
    (finding,) = (finding for finding in examine(space) if finding.check == "sources")
    assert finding.level == "warning"
    assert "in/fifo.csv is not a regular file" in finding.message and "since" in finding.message
    assert "new.csv" not in finding.message
    (folder / "fifo.csv").unlink()
    (folder / "gone.csv").unlink()
    change_params(space, {"/etc/*, ": ""})
    space = open_workspace(space.layout.root)
    report = tick(space, lambda: oracle, now=lambda: datetime.now(UTC) + timedelta(minutes=5))
    assert (report.warnings, status(space).sources, status(space).incoming) == ((), (), 1)


# Order --------------------------------------------------------------------------------------------------------------
ROWS = st.lists(st.sampled_from([f"{n},text {n}" for n in range(40)]), max_size=20)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(files=st.lists(ROWS, min_size=1, max_size=4), order=st.permutations(range(4)), data=st.data())
def test_the_order_of_sources_changes_neither_pool_nor_test_set(tmp_path_factory, files, order, data):
    """Of the patterns in params.yaml, and of the files by their names: the test set is drawn from all of them."""
    found = []
    for names in (range(4), order):
        folder = tmp_path_factory.mktemp("order")
        patterns = data.draw(st.permutations(["incoming/0.csv", "incoming/1.csv", "incoming/*.csv", "**/3.csv"]))
        space = with_params(make_workspace(folder, test_size=3), sources=json.dumps(patterns))
        incoming(space).mkdir()
        for name, rows in itertools.zip_longest(names, files, fillvalue=()):
            write(incoming(space) / f"{name}.csv", "id,text", *rows)
        ingest_sources(space, later())
        found.append(({i.item_id: i.text for i in pool(space)}, {i.item_id: i.text for i in test_set(space)}))
    assert found[0] == found[1]
    everything = {row.partition(",")[0] for rows in files for row in rows}
    assert found[0][0].keys() | found[0][1].keys() == everything
    assert len(found[0][1]) == min(3, len(everything) // 5)


def test_a_kill_between_two_first_files_leaves_the_test_set_to_be_drawn_from_both(tmp_path, monkeypatch):
    def made(name):
        space = with_params(make_workspace(tmp_path / name, test_size=10), sources="['*.csv']")
        for number in range(2):
            write(space.layout.root / f"{number}.csv", "text", *(f"text {n}" for n in range(number, 60, 2)))
        return space

    whole, killed = made("whole"), made("killed")
    assert ingest_sources(whole, later()) == (60, [])
    take, calls = ingest, []

    def once(*arguments, **more):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return take(*arguments, **more)

    monkeypatch.setattr(ingest_module, "ingest", once)
    with pytest.raises(KeyboardInterrupt):
        ingest_sources(killed, later())
    monkeypatch.undo()
    ingest_sources(killed, later())
    assert len(test_set(whole)) == 10
    assert {item.text for item in test_set(whole)} == {item.text for item in test_set(killed)}
