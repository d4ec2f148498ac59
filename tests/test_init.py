"""`al init`: a workspace that is committed and clean, whatever its labels are called and wherever it was killed."""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import BadInput, BadParams, RepositoryError
from al_pipeline.files import read_json
from al_pipeline.layout import Layout
from al_pipeline.operations import init as module
from al_pipeline.operations.init import init, template, with_schema
from al_pipeline.params import parse_params
from al_pipeline.repository import Dvc, Git
from al_pipeline.schema_change import plain_form
from al_pipeline.workspace import open_workspace

ROOT = Path(__file__).parents[1]
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
    assert "# in the order shown" in made.params.read_text(encoding="utf-8"), "comments stay"
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
    with pytest.raises(BadInput, match="is a workspace already"):
        init(tmp_path / "w", ["a", "b"])


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
        (["ham"], "at least 2 items"),
        (["ham", ""], "schema.labels.1"),
        (["ham", "HAM"], "differ by more than case"),
        (["ham", "spam "], "begin or end with blanks"),
        (["ham", "a\nb"], "schema.labels.1"),
        (["ham", "x" * 101], "at most 100"),
        ([str(number) for number in range(201)], "at most 200"),
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


class Killed(BaseException):
    """Stands for a process that ends."""


def dies(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool) -> None:
    whole: Callable[..., Any] = getattr(owner, name)

    def die(*arguments: Any, **more: Any) -> Any:
        if after:
            whole(*arguments, **more)
        raise Killed

    monkeypatch.setattr(owner, name, die)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a repository"])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(module, "write_json", True), (module, "write_text", True), (Git, "init", True), (Dvc, "init", True)],
    ids=["marker", "params", "git", "dvc"],
)
def test_killed_half_way_the_same_call_finishes_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool, inside: bool
) -> None:
    if inside:
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
        subprocess.run(["git", "commit", "--quiet", "--allow-empty", "-m", "Outer"], cwd=tmp_path, check=True)
    with monkeypatch.context() as patch:
        dies(patch, owner, name, after)
        with pytest.raises(Killed):
            init(tmp_path / "w", ["a", "b"])
    begun = read_json(tmp_path / "w/al-workspace.json")
    workspace = init(tmp_path / "w", ["a", "c"])
    assert begun == read_json(workspace.layout.marker), "it is still the same workspace"
    assert workspace.params.schema_.labels == ["a", "c"]
    git = Git(workspace.layout.root)
    assert git.run("status", "--porcelain").stdout == ""
    assert git.run("rev-list", "--count", "HEAD").stdout.strip() == "1"


def test_what_a_killed_write_left_does_not_make_the_folder_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".al-tmp-x.json").write_text("{", encoding="utf-8")
    dies(monkeypatch, module, "write_json", True)
    with pytest.raises(Killed):
        init(tmp_path, ["a", "b"])
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
            or name in ("demo", "build", "tests", "benchmarks", "__pycache__")
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

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [str(python), "-I", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = run("-c", "import al_pipeline, flows.rounds; print(al_pipeline.__file__)")
    assert Path(where.strip()).is_relative_to(library), "the wheel is what is tested, not the source"
    found = json.loads(run("-m", "al_pipeline.cli", "init", "spam", "--labels", "ham,spam", "--json"))
    assert found["workspace"] == str(tmp_path / "spam")
    for name in ("params.yaml", "dvc.yaml"):
        assert (tmp_path / "spam" / name).is_file()
    assert (tmp_path / "spam/dvc.yaml").read_bytes() == (ROOT / "dvc.yaml").read_bytes()
    package = library / "al_pipeline"
    for folder in ("templates", "locks"):
        carried = {path.name: path.read_bytes() for path in (package / folder).iterdir()}
        assert carried == {path.name: path.read_bytes() for path in (ROOT / "al_pipeline" / folder).iterdir()}
    assert (package / "py.typed").is_file()
    assert "al = al_pipeline.cli:main" in next(library.glob("al_pipeline-*/entry_points.txt")).read_text(
        encoding="utf-8"
    )
