"""The documents against what they speak of: commands, options, parameters, files, links; and the site that is built."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import typer
from rich.console import Console

from al_pipeline.active_learning.strategies import STRATEGIES
from al_pipeline.cli.app import app
from al_pipeline.params import Params
from al_pipeline.simulation.replay import MeanPoint
from examples.spam import demo
from examples.spam.corpus import GROUPS

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "data/README.md")), *GUIDES]
ROOT_COMMAND = typer.main.get_command(app)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """docs/generated.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs/generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, and code within sentences."""
    for place, part in enumerate(re.split(r"(?m)^ *```.*$", text)):
        yield from part.splitlines() if place % 2 else re.findall(r"`([^`]+)`", " ".join(part.split()))


def commands(text: str) -> Iterator[list[str]]:
    """Each `al …` that the code of a document holds, as words."""
    for line in code(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # prose with an apostrophe, in a diagram
            continue
        call: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|;&"):
                if call[:1] == ["al"] and len(call) > 1:
                    yield call
                call = []
            else:
                call.append(word)


def wrong(call: list[str]) -> str | None:
    """What is wrong with a call of `al`, by the command line's own description."""
    command: Any = ROOT_COMMAND
    known = options(command)
    for word in call[1:]:
        if word.startswith("-") and len(word) > 1:
            if word.partition("=")[0] not in known:
                return f"no option {word}"
        elif children := getattr(command, "commands", None):
            if word in children:
                command = children[word]
                known = known | options(command)
            elif command is ROOT_COMMAND and re.fullmatch(r"[A-Z]+|…|\.\.\.", word):
                return None  # any command
            elif command is ROOT_COMMAND and not word.startswith("/"):  # what -C takes
                return f"no command {word}"
    return None


def options(command: Any) -> set[str]:
    own = {name for one in command.params if one.param_type_name == "option" for name in one.opts + one.secondary_opts}
    return own | {"--help", "-h"}


def test_what_is_wrong_with_a_call_is_seen() -> None:
    assert wrong(["al", "predict", "new.csv", "--columns", "-o", "p.csv", "-"]) is None
    assert wrong(["al", "-C", "/srv/spam", "round"]) is None
    assert wrong(["al", "predict", "--colums"]) == "no option --colums"
    assert wrong(["al", "mend"]) == "no command mend"
    assert wrong(["al", "labels", "revoke", "--undo"]) == "no option --undo"
    assert [*commands("`al up`\n```\ncd x && al round --size 3  # why\n```\n`al`")] == [
        ["al", "up"],
        ["al", "round", "--size", "3"],
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_documents_name_commands_and_options_that_exist(path: Path) -> None:
    found = [*commands(path.read_text(encoding="utf-8"))]
    assert {" ".join(call): problem for call in found if (problem := wrong(call))} == {}


def test_the_readme_names_many_commands() -> None:
    """So that the test above cannot pass by finding none."""
    assert len({tuple(call) for call in commands((ROOT / "README.md").read_text(encoding="utf-8"))}) > 30


def test_messages_and_docstrings_name_commands_that_exist() -> None:
    """Texts of the package that say `al …`, and what is bold on a terminal."""
    found: dict[str, str | None] = {}
    for path in [*(ROOT / "al_pipeline").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(one.value) if isinstance(one, ast.Constant) else "X" for one in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            for said in re.findall(r"`al [^`]*`|\[bold\]al [^\[]*\[/\]", text):
                shown = re.sub(r"\[bold\]|\[/\]", "`", said)
                found |= {f"{path.name}: {shown}": wrong(call) for call in commands(shown)}
    for name in ("params.yaml", "prefect.yaml", "al_pipeline/reporting/templates/report.html"):
        for shown in re.findall(r"`al [^`]*`", (ROOT / name).read_text(encoding="utf-8")):
            found |= {f"{name}: {shown}": wrong(call) for call in commands(shown)}
    assert {shown: problem for shown, problem in found.items() if problem} == {}
    assert len(found) > 150


def leaves(command: Any = ROOT_COMMAND, name: str = "al") -> Iterator[tuple[str, Any]]:
    for inner, child in getattr(command, "commands", {}).items():
        yield f"{name} {inner}", child
        yield from leaves(child, f"{name} {inner}")


def test_the_reference_has_every_command_and_option(generated: ModuleType) -> None:
    page = generated.fill((ROOT / "docs/reference/commands.md").read_text(encoding="utf-8"))
    sections = {part.splitlines()[0]: part for part in page.split("\n### ")[1:]}
    assert list(sections) and set(sections) == {name for name, _ in leaves()}
    for name, command in leaves():
        assert [one for one in options(command) - {"--help", "-h"} if f"`{one}`" not in sections[name]] == [], name


def test_the_strategies_of_the_readme_and_the_page_are_those_there_are(generated: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| strategy | selects") : text.index("A tenth of each batch")]
    firsts = {
        name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1:2][0] if row else "")
    }
    assert firsts == {*STRATEGIES, "auto"}
    page = generated.strategies()
    for name in set(STRATEGIES) - {"random"}:
        told = page[page.index(f"### {name}\n") :].split("\n### ")[0]
        assert re.search(r"\(.*\d{4}|arXiv", told), f"{name} cites no paper"


def keys(model: type[msgspec.Struct] = Params, at: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(model):
        path = f"{at}{field.encode_name}"
        yield path
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from keys(field.type, f"{path}.")


def test_the_reference_has_every_parameter_with_its_value(generated: ModuleType) -> None:
    page = generated.parameters()
    for key in set(keys()) - {"schema.meanings"}:  # which the file has in `schema.labels`
        assert f"`{key}`" in page or f"## {key}" in page, key
    assert "| `round.quorum` | `0.9` | number, more than 0, at most 1 |" in page
    assert "one of `encoder`, `tfidf`, `encoder+tfidf`" in page


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_documents_name_parameters_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    sections = "|".join(key for key in Params.__struct_encode_fields__ if key != "schema")
    found = set(re.findall(rf"`((?:{sections}|schema)\.[a-z_.]+)[`:]", text))
    assert {key for key in found if not key.endswith((".json", ".py"))} - {*keys()} == set()


@pytest.mark.parametrize("path", DOCUMENTS[:4], ids=named)
def test_links_of_the_documents_at_the_root_lead_somewhere(path: Path) -> None:
    """Those of the site are followed by its build."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https://", target):
            continue
        file, _, anchor = target.partition("#")
        there = path if not file else path.parent / file
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)", there.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}, target


def test_the_tests_that_security_names_exist() -> None:
    named_tests = 0
    for row in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines():
        for file, parts in re.findall(r"`(test_\w+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", row if row[:1] == "|" else ""):
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            for part in re.findall(r"`(\w+)`", parts):
                named_tests += 1
                assert re.search(rf"(?m)^ *def test_\w*{part}", source), f"{file} has no test {part}"
    assert named_tests > 15


def test_the_readme_ends_with_the_tree_that_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.rindex("## The tree") :]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("!! NOT TESTED: this is no git checkout")
    tops = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    ignored = {"LICENSE", "MANIFEST.in", ".gitignore", ".gitattributes"}
    assert [top for top in sorted(tops - ignored) if top not in tree] == []
    for line in tree.split("```")[1].strip().splitlines():
        for name in re.split(r"\s{2,}", line)[0].split():
            assert (ROOT / name).exists(), name


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-E", "-q", str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def with_sphinx() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["docs"]
    for module in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"!! NOT TESTED: no {module} here; pip install -e '.[docs]' installs it")


class Loaded(HTMLParser):
    """What a page loads by itself, and the pages that it leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.leads.append(given.get("href") or "")
        else:
            self.loads += [given.get(name) or "" for name in ("src", "href", "srcset", "data") if given.get(name)]


@pytest.mark.slow
def test_the_site_is_built_and_opens_offline(with_sphinx: None, tmp_path: Path) -> None:
    done = build(ROOT / "docs", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {page.stem for page in GUIDES} <= {page.stem for page in pages}
    for page in pages:
        seen = Loaded()
        text = page.read_text(encoding="utf-8")
        seen.feed(text)
        assert seen.loads and [one for one in seen.loads if re.match(r"(https?:)?//", one)] == [], page.name
        for target in seen.leads:
            file = target.partition("#")[0]
            if file and "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / file).exists(), f"{page.name} leads to {target}"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
    commands_page = (tmp_path / "site/reference/commands.html").read_text(encoding="utf-8")
    assert [name for name, _ in leaves() if f'id="{name.replace(" ", "-")}"' not in commands_page] == []
    python = (tmp_path / "site/reference/python.html").read_text(encoding="utf-8")
    assert "al_pipeline.frames.labeled" in python and "Raises NothingToDo" in python


def test_a_mark_that_means_nothing_is_an_error(generated: ModuleType) -> None:
    assert "al_pipeline.frames.rounds" in generated.fill("<!-- generated: python -->")
    with pytest.raises(KeyError):
        generated.fill("<!-- generated: gone -->")


@pytest.mark.slow
def test_dead_links_and_anchors_fail_the_build(with_sphinx: None, tmp_path: Path) -> None:
    """On a site of two pages, which takes less time than all."""
    source = tmp_path / "docs"
    source.mkdir()
    for name in ("conf.py", "generated.py"):
        shutil.copy(ROOT / "docs" / name, source)
    shutil.copytree(ROOT / "docs/_static", source / "_static")
    links = "[good](tutorial.md#here) [link](gone-page.md) [anchor](tutorial.md#gone-anchor)"
    (source / "index.md").write_text(f"# A page\n\n```{{toctree}}\ntutorial\n```\n\n{links}\n")
    (source / "tutorial.md").write_text("# Tutorial\n\n## Here\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    assert "gone-page" in done.stderr and "gone-anchor" in done.stderr and "here" not in done.stderr


def test_the_demo_ends_with_what_to_do_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    (tmp_path / "key").write_text("al:secret\n", encoding="utf-8")
    status = {
        "label_studio_page": "http://127.0.0.1:1/projects/1/data",
        "prefect_url": "http://127.0.0.1:2",
        "round": 3,
    }
    fakes = {
        "console": Console(file=out, width=120, highlight=False, soft_wrap=True),
        "al": lambda *_: status,
        "read_json": lambda _: {demo.PEOPLE[0]: {"password": "known"}},
        "open_workspace": lambda _: None,
        "password_file": lambda _: tmp_path / "key",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(demo, name, fake)
    workspace: Any = SimpleNamespace(layout=SimpleNamespace(root=tmp_path / "demo"), home=tmp_path)
    demo._farewell(workspace, tmp_path / "report.html")
    said = " ".join(out.getvalue().split())
    assert 'Label Studio: http://127.0.0.1:1/projects/1/data, then the button "Label All Tasks"' in said
    assert f"log in as {demo.PEOPLE[0]}, password known" in said and "log in with al:secret" in said
    assert "Round 3 waits for answers." in said


def test_the_demo_tells_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that late answers keep open is ticked again, and Label Studio then has the others already."""
    out = io.StringIO()
    found = iter([demo.Done(answered=3), demo.Done(already=3), demo.Done(answered=1, already=3)])
    monkeypatch.setattr(demo, "console", Console(file=out, width=120, highlight=False, soft_wrap=True))
    monkeypatch.setattr(demo, "answer_round", lambda *_, **__: next(found))
    told: set[str] = set()
    for _ in range(3):
        demo._answer("", 1, [], {}, 2, told)
    first, second = (line.strip() for line in out.getvalue().splitlines())
    assert first.startswith("round 2: 0 annotators answer: 3 answered (")
    assert second.startswith("round 2: 0 annotators answer: 1 answered, 3 already answered (")


def test_the_demo_prints_what_the_readme_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the figures of the recorded run in place of servers, annotators and models."""
    run = json.loads((ROOT / "benchmarks/results/demo.json").read_text(encoding="utf-8"))["figures"]
    ticks = iter(run["seconds"]["ticks"])
    answers = {number: tick["answering"] for number, tick in enumerate(run["seconds"]["ticks"]) if "answering" in tick}
    rows = [
        {"round": row["round"], "labelled": row["labels"], "metrics": {"macro_f1": row["macro_f1"]}}
        | {"verdict": "promoted"}
        for row in run["curve"]
    ]
    state: dict[str, Any] = {"round": -1, "project_id": 1, "pool": 0, "label_studio_url": ""}

    def al(folder: Path | None, *words: str, **more: Any) -> dict[str, Any]:
        return state if words == ("status",) else {"rounds": rows}

    def tick(folder: Path) -> tuple[dict[str, Any], float]:
        state["round"] += 1
        found = next(ticks)
        return {"published": found["published"], "steps": {}, "waits_for": ""}, found["tick"]

    def answer_round(*given: Any, round_number: int, late: bool, **more: Any) -> demo.Done:
        return demo.Done() if late else demo.Done(**answers[round_number])

    out = io.StringIO()
    fakes = {
        "console": Console(file=out, width=120, highlight=False, soft_wrap=True),
        "al": al,
        "run_tick": tick,
        "answer_round": answer_round,
        "set_params": lambda *_: None,
        "open_workspace": lambda _: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(demo, name, fake)
    timings = demo.Timings()
    demo.create_workspace(
        tmp_path / "demo", demo.Prepared(mails=sum(GROUPS.values()), pool=tmp_path, key=tmp_path), timings
    )
    demo._rounds(tmp_path / "demo", "", [demo.Annotator(person, "") for person in demo.PEOPLE], {}, 3, timings)
    kinds = ("active", "random", "gain")
    points = {kind: tuple(MeanPoint(**point) for point in run["replay"][kind]) for kind in kinds}
    demo.console.print(demo._table(rows, demo.Comparison(run["replay"]["strategy"], **points), run["replay"]["seeds"]))

    printed = iter([line.rstrip() for line in out.getvalue().splitlines()])
    [quoted] = re.findall(r"(?s)```\n(› Creating.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))
    missing = [line for line in quoted.splitlines() if line.strip() != "…" and line not in printed]
    assert missing == [], "in this order"
