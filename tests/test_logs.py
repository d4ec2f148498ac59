"""The log: every layer that acts has one, it holds no secret, and nobody sees it who did not ask."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import Played, answer_all, copy_workspace, go_on

from al_pipeline import logs
from al_pipeline.errors import AlError
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.logs import VARIABLE, Level, get_logger, show, without_secrets
from al_pipeline.operations.tick import tick

PACKAGE = Path(__file__).parents[1] / "al_pipeline"
SECRET = "hunter2c0ffee"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test shows, the next one does not."""
    logger = logging.getLogger("al_pipeline")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://al:{SECRET}@host/path",
        f"ssh://{SECRET}@host:22/repository",
        f"GET /api/tasks/?page=1&access_token={SECRET}&size=2",
        f"https://bucket.example/object?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
        f"Authorization: Token {SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}', 'Accept': '*/*'}}",
        f"authorization=Basic {SECRET}",
        f"git -c http.extraHeader=Authorization: Basic {SECRET} push",
        f'{{"refresh": "{SECRET}"}}',
        f"Authorization: Digest username=al, response={SECRET}",
        f"Cookie: theme=dark; sessionid={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"password: {SECRET}",
    ],
)
def test_no_line_holds_a_secret_whoever_handles_it(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert SECRET not in without_secrets(text) and "***" in without_secrets(text)
    with caplog.at_level(logging.DEBUG, "al_pipeline"):
        get_logger("al_pipeline.somewhere").debug("asked\n\x1b[2Jonce: %s", text)
    [line] = caplog.messages
    assert SECRET not in line and "***" in line
    assert line.startswith("asked [2Jonce: ")


def test_what_is_no_secret_stays() -> None:
    for text in (
        "the token of Label Studio is empty",
        "git push origin round-0001",
        "http://127.0.0.1:8080/api?page=1",
    ):
        assert without_secrets(text) == text


def test_every_layer_that_acts_has_loggers_and_each_bears_its_modules_name() -> None:
    layers = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name != "logs.py":
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "getLogger"
                        and path.name not in ("rounds.py", "apprise_process.py")], path  # fmt: skip
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == "get_logger":
                assert ast.unparse(call) == "get_logger(__name__)", path
                layers.add(path.relative_to(PACKAGE).parts[0])
    assert layers == {"flows", "integrations", "operations", "servers", "serving", "stages", "traffic"}


def test_git_commands_are_logged_with_their_time_and_without_log_ins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    git = Git(tmp_path)
    git.init()
    with caplog.at_level(logging.DEBUG, "al_pipeline"):
        git.run("remote", "add", "origin", f"https://al:{SECRET}@git.example/spam.git")
    assert SECRET not in caplog.text
    [record] = [record for record in caplog.records if "remote add" in record.message]
    assert (record.name, record.levelname) == ("al_pipeline.integrations.git.runner", "DEBUG")
    assert "https://***@git.example/spam.git ended with 0 after 0." in record.message


@pytest.mark.parametrize("token", [SECRET * 4, f"{SECRET}.{SECRET}.{SECRET}"])
def test_requests_to_label_studio_are_logged_without_what_they_carry(
    token: str, caplog: pytest.LogCaptureFixture
) -> None:
    replies = iter([503, 200])

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(next(replies), json={"id": 1, "email": "ann@example.org", "access": SECRET})

    transport = httpx.MockTransport(handler)
    with (
        caplog.at_level(logging.DEBUG, "al_pipeline"),
        LabelStudioOracle("http://ls.example", token, sleep=lambda _: None, transport=transport) as oracle,
        pytest.raises((AlError, StopIteration, RuntimeError)),
    ):
        oracle.about()
    said = [(record.levelname, record.message) for record in caplog.records if "label_studio" in record.name]
    assert SECRET not in caplog.text
    assert any(level == "DEBUG" and "/api/" in text and ": 503 after 0." in text for level, text in said), said
    assert any(level == "WARNING" and text.startswith("attempt 1 of 4, the next in ") for level, text in said), said


@pytest.mark.slow
def test_a_tick_says_its_steps_what_came_of_them_and_what_it_left_out(
    started: Played, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    answer_all(oracle, truth)
    with caplog.at_level(logging.INFO, "al_pipeline"):
        report = tick(workspace, lambda: oracle)
    said = {record.message for record in caplog.records if record.levelno == logging.INFO}
    for step, _ in report.steps:
        assert any(f": {step} took " in line for line in said), step
    assert any(line.startswith("answers: ") for line in said)
    assert any(line.startswith("closing round 0: ") for line in said)
    assert any(line.startswith("published in commit ") for line in said)
    assert f"waits for: {report.waits_for}" in said
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == list(report.warnings)


def al(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "al_pipeline.cli.app", *words],
        env={**{name: value for name, value in os.environ.items() if name != VARIABLE}, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_nobody_sees_it_who_did_not_ask(template: Any, tmp_path: Path) -> None:
    root = copy_workspace(template, tmp_path).layout.root
    plain = al("-C", str(root), "status")
    assert (plain.returncode, plain.stderr) == (0, "")
    asked = al("-C", str(root), "--log-level", "debug", "status")
    assert asked.stdout == plain.stdout
    assert " DEBUG   al_pipeline.integrations.git.runner: git ls-tree " in asked.stderr
    by_variable = al("-C", str(root), "status", **{VARIABLE: "Debug"})
    assert by_variable.stdout == plain.stdout and " DEBUG   al_pipeline.integrations.git.runner: " in by_variable.stderr
    assert al("-C", str(root), "status", **{VARIABLE: "warning"}).stderr == ""
    wrong = al("--log-level", "loud", "status")
    assert wrong.returncode == 2 and "'loud'" in wrong.stderr and "'debug'" in wrong.stderr


def test_it_is_shown_on_what_standard_error_is_and_from_the_level_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = get_logger("al_pipeline.somewhere")
    show(Level.WARNING)
    logs.record_from(logging.DEBUG)  # as another handler may want
    logger.info("not this")
    logger.warning("but this")
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith("WARNING al_pipeline.somewhere: but this\n") and "not" not in said.err
