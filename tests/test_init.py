"""`al init`: a workspace that is committed and clean, whatever its labels are called and wherever it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import copy_workspace, play, tools_first
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadInput, BadParams, RepositoryError
from al_pipeline.files import read_json
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import init as module
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.init import init, template, with_schema
from al_pipeline.operations.report import write_report
from al_pipeline.params import parse_params
from al_pipeline.sanitize import plain_form
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import open_workspace

ROOT = Path(__file__).parents[1]
AL = Path(sys.executable).parent / "al"
ODD = [
    "it's",
    'say "no"',
    "key: value",
    "- dash",
    "yes",
    "no",
    "null",
    "1.5",
    "spämm",
    "垃圾邮件",
    "🙂",
    "#hash",
    "{a}",
    "*a",
    "\\",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A workspace with odd labels, inside somebody else's repository; look, do not touch."""
    outer = tmp_path_factory.mktemp("outer")
    subprocess.run(["git", "init", "--quiet"], cwd=outer, check=True)
    (outer / "theirs").write_text("x", encoding="utf-8")
    (outer / ".gitignore").write_text("/deep/workspace/\n", encoding="utf-8")
    subprocess.run(["git", "add", "."], cwd=outer, check=True)
    subprocess.run(["git", "commit", "--quiet", "-m", "Theirs"], cwd=outer, check=True)
    return init(outer / "deep/workspace", ODD, "Which \"one\" is it: a, b or c? \\ 'quoted'").layout


@pytest.mark.slow
def test_everything_is_committed_and_clean(made: Layout) -> None:
    git = Git(made.root)
    assert git.run("status", "--porcelain").stdout == ""
    assert git.run("rev-list", "--count", "HEAD").stdout.strip() == "1"
    assert git.branch() == "main"
    committed = set(git.run("ls-files").stdout.split())
    assert {"al-workspace.json", "params.yaml", "dvc.yaml", ".gitignore", ".dvc/config"} <= committed
    assert not {name for name in committed if name.startswith((".al/", "data/"))}
    with Dvc(made.root, made.private / "dvc.json", made.logs / "dvc.log") as dvc:
        assert "core.analytics" not in dvc.changed()
    assert "analytics = false" in (made.root / ".dvc/config").read_text(encoding="utf-8")


@pytest.mark.slow
def test_labels_and_question_are_what_was_given(made: Layout) -> None:
    params = open_workspace(made.root).params
    assert params.schema_.labels == ODD
    assert params.schema_.question == "Which \"one\" is it: a, b or c? \\ 'quoted'"
    assert "# classes in display order" in made.params.read_text(encoding="utf-8"), "comments stay"
    assert made.dvc_yaml.read_bytes() == (ROOT / "dvc.yaml").read_bytes()


@pytest.mark.slow
def test_the_repository_around_it_is_left_alone(made: Layout) -> None:
    outer = Git(made.root.parents[1])
    assert outer.run("rev-list", "--count", "HEAD").stdout.strip() == "1"
    assert outer.run("diff", "--cached", "--name-only").stdout == ""


@pytest.mark.slow
def test_the_default_remote_is_a_folder_of_this_user(tmp_path: Path, al_home: Path) -> None:
    workspace = init(tmp_path / "w", ["a", "b"])
    with Dvc(tmp_path / "w", tmp_path / "s.json", tmp_path / "log") as dvc:
        assert dvc.check_writable() == str(al_home / workspace.id / "dvc-remote")
    with pytest.raises(BadInput, match="is already a workspace"):
        init(tmp_path / "w", ["a", "b"])


@pytest.mark.slow
def test_a_pull_by_hand_refuses_an_object_with_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clone, by a plain `dvc`, which lacks our own checks."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    remote, environment = tmp_path / "remote", tools_first()
    root = init(tmp_path / "w", ["a", "b"], remote=str(remote)).layout.root
    section = (root / ".dvc/config").read_text(encoding="utf-8").split("""['remote "store"']""")[1]
    assert "verify = true" in [line.strip() for line in section.splitlines()]

    (root / "mine.txt").write_text("as it was added", encoding="utf-8")
    for words in (
        ["dvc", "add", "mine.txt"],
        ["dvc", "push"],
        ["git", "add", "mine.txt.dvc"],
        ["git", "commit", "--quiet", "-m", "Add"],
        ["git", "clone", "--quiet", ".", str(tmp_path / "clone")],
    ):
        subprocess.run(words, cwd=root, env=environment, check=True, capture_output=True)
    [stored] = [path for path in remote.rglob("*") if path.is_file()]
    content = stored.read_bytes()
    stored.chmod(0o644)
    stored.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    stored.chmod(0o444)  # as it was; DVC takes the content of a read-only object for granted unless told to verify it
    pull = subprocess.run(
        ["dvc", "pull", "mine.txt"], cwd=tmp_path / "clone", env=environment, capture_output=True, text=True
    )
    assert pull.returncode != 0 and "mine.txt" in pull.stderr, pull.stderr
    assert not (tmp_path / "clone/mine.txt").exists()


def test_a_folder_that_is_not_empty_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w/thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(BadInput, match="is not empty; choose a new folder"):
        init(tmp_path / "w", ["a", "b"])
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["thesis.tex"]
    with pytest.raises(BadInput, match="is a file"):
        init(tmp_path / "w/thesis.tex", ["a", "b"])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([], "schema.labels"),
        (["ham"], "list of 2 to 200 names"),
        (["ham", ""], "schema.labels.1"),
        (["ham", "HAM"], "differ by more than case"),
        (["ham", "spam "], "begin or end with blanks"),
        (["ham", "a\nb"], "schema.labels.1"),
        (["ham", "x" * 101], "text of 1 to 100 characters"),
        ([str(number) for number in range(201)], "list of 2 to 200 names"),
    ],
)
def test_labels_that_are_no_good_leave_no_folder(tmp_path: Path, labels: list[str], says: str) -> None:
    with pytest.raises(BadParams, match=says):
        init(tmp_path / "w", labels)
    assert not (tmp_path / "w").exists()


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
    lambda name: name == name.strip() and plain_form(name) != ""
)


@given(st.lists(NAMES, min_size=2, max_size=60, unique_by=plain_form), NAMES)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_labels_and_question_come_back_from_the_template(labels: list[str], question: str) -> None:
    params = parse_params(with_schema(template("params.yaml"), labels, question))
    assert (params.schema_.labels, params.schema_.question) == (labels, question)
    assert params.select == parse_params(template("params.yaml")).select


def test_sixty_labels_are_taken() -> None:
    labels = [f"class {number}" for number in range(60)]
    assert parse_params(with_schema(template("params.yaml"), labels, None)).schema_.labels == labels


def killed_after(owner: Any, name: str, action: Callable[[], object]) -> None:
    """Run `action` in a process that ends at once after the first call of `owner.name`."""
    if (pid := os.fork()) == 0:
        whole: Callable[..., Any] = getattr(owner, name)

        def die(*arguments: Any, **more: Any) -> Any:
            whole(*arguments, **more)
            os._exit(9)

        setattr(owner, name, die)
        action()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a repository"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(module, "write_json"), (module, "write_text"), (Git, "init"), (Dvc, "init")],
    ids=["marker", "params", "git", "dvc"],
)
def test_killed_half_way_the_same_call_finishes_the_job(tmp_path: Path, owner: Any, name: str, inside: bool) -> None:
    if inside:
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        (tmp_path / ".gitignore").write_text("/w/\n", encoding="utf-8")
        subprocess.run(["git", "commit", "--quiet", "--allow-empty", "-m", "Outer"], cwd=tmp_path, check=True)
    killed_after(owner, name, lambda: init(tmp_path / "w", ["a", "b"]))
    begun = read_json(tmp_path / "w/al-workspace.json")
    workspace = init(tmp_path / "w", ["a", "c"])
    assert begun == read_json(workspace.layout.marker), "it is still the same workspace"
    assert workspace.params.schema_.labels == ["a", "c"]
    git = Git(workspace.layout.root)
    assert git.run("status", "--porcelain").stdout == ""
    assert git.run("rev-list", "--count", "HEAD").stdout.strip() == "1"


def test_what_a_killed_write_left_does_not_make_the_folder_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / ".al-tmp-x.json").write_text("{", encoding="utf-8")
    killed_after(module, "write_json", lambda: init(tmp_path, ["a", "b"]))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".al-tmp")] == []


def test_a_git_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RepositoryError, match="git is not installed"):
        init(tmp_path / "w", ["a", "b"])


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_makes_a_workspace(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=lambda folder, names: [
            name
            for name in names
            if name.startswith(".")
            or name in ("demo", "demo-live", "demo-team", "build", "__pycache__")
            or name.endswith(".egg-info")
        ],
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    (library,) = (environment / "lib").glob("python*/site-packages")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(library), str(wheel)], check=True, timeout=300
    )
    (library / "rest.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    python = environment / "bin/python"

    def run(*arguments: str, cwd: Path = tmp_path) -> str:
        result = subprocess.run(
            [str(python), "-I", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = run("-c", "import al_pipeline, al_pipeline.flows.rounds; print(al_pipeline.__file__)")
    assert Path(where.strip()).is_relative_to(library), "the wheel is what is tested, not the source"
    found = json.loads(run("-m", "al_pipeline.cli.app", "init", "spam", "--labels", "ham,spam", "--json"))
    assert found["workspace"] == str(tmp_path / "spam")
    assert json.loads(run("-m", "al_pipeline.cli.app", "status", "--json", cwd=tmp_path / "spam"))["pool"] == 0
    for name in ("params.yaml", "dvc.yaml"):
        assert (tmp_path / "spam" / name).is_file()
    assert (tmp_path / "spam/dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    package = library / "al_pipeline"
    for folder in ("reporting/templates", "locks"):
        carried = {path.name: path.read_bytes() for path in (package / folder).iterdir()}
        assert carried == {path.name: path.read_bytes() for path in (ROOT / "al_pipeline" / folder).iterdir()}
    assert (package / "py.typed").is_file()
    installed = {
        path.name for path in library.iterdir() if path.name != "bin" and path.suffix not in (".dist-info", ".pth")
    }
    assert installed == {"al_pipeline"}, "no `flows` at the top, a name that many Prefect repositories have"
    assert "al = al_pipeline.cli.app:main" in next(library.glob("al_pipeline-*/entry_points.txt")).read_text(
        encoding="utf-8"
    )


# What a failed call leaves -------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def fails(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, late: bool) -> None:
    whole: Callable[..., Any] = getattr(owner, name)

    def fail(*arguments: Any, **more: Any) -> Any:
        if late:
            whole(*arguments, **more)
        raise error

    monkeypatch.setattr(owner, name, fail)


FAILURES = [
    (Git, "init", RepositoryError("git failed"), False),
    (Git, "init", KeyboardInterrupt(), True),
    (Dvc, "init", RepositoryError("dvc failed"), True),
    (Git, "commit", OSError(28, "No space left on device"), False),
    (module, "write_text", OSError(28, "No space left on device"), True),
]


@pytest.mark.parametrize(("owner", "name", "error", "late"), FAILURES, ids=[f"{f[1]} {f[2]!r:.20}" for f in FAILURES])
@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a repository", "a repository with an index"])
def test_a_failed_call_leaves_what_was_there_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    owner: Any,
    name: str,
    error: BaseException,
    late: bool,
) -> None:
    folder = tmp_path / "deep/w"
    if before != "nothing":
        folder.mkdir(parents=True)
    if before.startswith("a repository"):
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    if before == "a repository with an index":
        (folder / "x").write_text("x", encoding="utf-8")
        subprocess.run(["git", "add", "x"], cwd=folder, check=True)
        (folder / "x").unlink()
    found = listing(tmp_path)
    with monkeypatch.context() as patch:
        fails(patch, owner, name, error, late)
        with pytest.raises(type(error)):
            init(folder, ["a", "b"])
    assert listing(tmp_path) == found
    assert init(folder, ["a", "b"]).layout.root == folder


@pytest.mark.usefixtures("cold")  # a fork would be done before the interrupt comes
def test_an_interrupt_while_dvc_works_leaves_nothing(tmp_path: Path, al_home: Path) -> None:
    command = [str(AL), "init", str(tmp_path / "w"), "--labels", "a,b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "w/.dvc").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not (tmp_path / "w").exists()
    assert not al_home.exists()


LOCALES = [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}]


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: " ".join(locale.values()))
def test_any_utf8_path_of_home_workspace_and_remote_works(tmp_path: Path, locale: dict[str, str]) -> None:
    place = tmp_path / 'ö 😀 it\'s "b" #;%=,$HOME\\[core]'
    place.mkdir()
    (place / "pool.csv").write_text("text\nüne\ndeux\ntrois\n", encoding="utf-8")
    environment = {**os.environ, "AL_HOME": str(place / "home"), **locale}
    for name in ("LANG", "DVC_SITE_CACHE_DIR"):
        environment.pop(name, None)

    def run(program: str, *words: str, cwd: Path = place / "w", **more: str) -> str:
        done = subprocess.run(
            [str(AL.with_name(program)), *words],
            cwd=cwd, env={**environment, **more}, capture_output=True, encoding="utf-8", errors="replace", timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    run("al", "init", str(place / "w"), "--labels", "a,b", "--remote", str(place / "remote"), cwd=place)
    run("al", "ingest", str(place / "pool.csv"))
    assert run("dvc", "config", "remote.store.url", PYTHONUTF8="1").strip() == str(place / "remote")
    assert f"Repo.site_cache_dir: {place / 'home'}/" in run("dvc", "doctor", PYTHONUTF8="1"), "by hand too"


@pytest.mark.slow
def test_a_whole_round_below_a_home_with_any_name(
    template: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "höme 🐟"
    home.mkdir()
    for name, place in (("HOME", home), ("AL_HOME", home / ".al höme")):
        monkeypatch.setenv(name, str(place))
    for name in ("DVC_SITE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    workspace, oracle = copy_workspace(template, home), SimulatedOracle()
    assert play(workspace, oracle, template[1], 1).published == (0,)
    assert list((home / f".al höme/{workspace.id}/dvc").iterdir()), "DVC keeps its state there"
    root = workspace.layout.root
    with open_dvc(workspace.layout) as dvc:
        assert dvc.changed() == {} and dvc.defects_in_remote() == []
    assert Git(root).run("status", "--porcelain").stdout == "" and "round-0000" in Git(root).tags()
    assert str(home) in write_report(open_workspace(root)).as_posix()


@pytest.mark.parametrize("name", [b"\xf6", b"a%(b)s", b"line\nbreak"])
def test_a_path_that_dvc_cannot_keep_is_refused_and_leaves_nothing(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(BadInput, match="UTF-8|cannot store"):
        init(tmp_path / "w", ["a", "b"], remote=str(tmp_path / os.fsdecode(name)))
    assert not (tmp_path / "w").exists()


# Where a workspace may lie, and how its classes are typed ------------------------------------------------------------


@pytest.mark.parametrize("below", ["inner", "data/deep/inner"])
def test_no_workspace_is_made_inside_another(tmp_path: Path, below: str) -> None:
    outer = init(tmp_path / "outer", ["a", "b"]).layout.root
    head = Git(outer).head()
    with pytest.raises(BadInput, match="is inside the workspace .*outer; choose a folder outside"):
        init(outer / below, ["a", "b"])
    assert Git(outer).head() == head and Git(outer).run("status", "--porcelain").stdout == ""
    assert not (outer / below).exists()


def test_inside_a_repository_only_where_that_ignores_it(tmp_path: Path) -> None:
    outer = tmp_path / "mono ö repo"
    outer.mkdir()
    Git(outer).run("init", "--quiet")
    folder = outer / "projects" / "spam"
    with pytest.raises(BadInput, match="a workspace is a repository of its own") as caught:
        init(folder, ["a", "b"])
    line = str(caught.value).split("add the line ")[1].split(" to ")[0]
    assert line == "/projects/spam/" and not folder.exists()
    (outer / ".gitignore").write_text(f"{line}\n", encoding="utf-8")
    init(folder, ["a", "b"])
    assert Git(folder).head() is not None and Git(outer).head() is None
    assert "projects" not in Git(outer).run("status", "--porcelain", "--untracked-files=all").stdout


def test_a_repository_just_made_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    Git(folder).run("init", "--quiet")
    assert init(folder, ["a", "b"]).layout.root == folder


NAMES = ["🐟", "größe", "日本", 'say "no"', "back\\slash", "\\U0001F41F", "👩‍👩‍👧", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "a: b # c", "می‌خواهم"]


def test_names_stand_in_the_parameters_as_they_were_typed(tmp_path: Path) -> None:
    workspace = init(tmp_path / "ws", NAMES, "Welches 🐟? \u202e \u2028")
    assert workspace.params.schema_.labels == NAMES
    assert workspace.params.schema_.question == "Welches 🐟? \u202e \u2028"
    text = workspace.layout.params.read_text(encoding="utf-8")
    for name in ("🐟", "größe", "日本", "👩‍👩‍👧", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "می‌خواهم"):
        assert f'    - "{name}"\n' in text, "no escapes"
    assert "\u202e" not in text and "\u2028" not in text, "what turns or breaks lines stays an escape"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_every_question_comes_back_as_it_was(question: str) -> None:
    text = with_schema(template("params.yaml"), ["a", "b"], question)
    assert yaml.safe_load(text)["schema"]["question"] == question
