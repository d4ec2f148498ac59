"""deploy/: the Compose file against its specification and against this repository; the scripts; the worker's image."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from composed import DEPLOY, compose
from conftest import require
from test_setup import pins

from al_pipeline.servers.label_studio_server import LABEL_STUDIO_VERSION

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/how-to/servers.md"
SERVICES: dict[str, Any] = compose()["services"]
BUILT_HERE = {"worker"}


@pytest.fixture(scope="module")
def specification() -> Any:
    """The JSON schema of the Compose specification, as check-jsonschema carries it."""
    try:
        folder = resources.files("check_jsonschema")
    except ModuleNotFoundError:
        require(False, "check-jsonschema is not installed; `make setup` installs it")
    return json.loads((folder / "builtin_schemas/vendor/compose-spec.json").read_text(encoding="utf-8"))


def test_the_file_is_what_the_specification_says(specification: Any) -> None:
    jsonschema.validate(compose(), specification)
    wrong = compose()
    wrong["services"]["worker"]["depend_on"] = wrong["services"]["worker"].pop("depends_on")
    with pytest.raises(jsonschema.ValidationError, match="depend_on"):
        jsonschema.validate(wrong, specification)


def test_everything_that_a_service_names_is_there() -> None:
    content = compose()
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped"
        assert set(service["secrets"]) <= set(content["secrets"]), name
        assert set(service["networks"]) <= set(content["networks"]), name
        sources = [volume.split(":")[0] for volume in service["volumes"]]
        assert {one for one in sources if not one.startswith("./")} <= set(content["volumes"]), name
        assert [one for one in sources if one.startswith("./") and not (DEPLOY / one).is_file()] == []
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other] and set(service["networks"]) & set(SERVICES[other]["networks"])
    used = [volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]]
    assert set(content["volumes"]) == {one for one in used if not one.startswith("./")}


def test_only_what_belongs_together_shares_a_network() -> None:
    reachable = {
        (one, other)
        for one in SERVICES
        for other in SERVICES
        if one < other and set(SERVICES[one]["networks"]) & set(SERVICES[other]["networks"])
    }
    assert reachable - {("label-studio", "prefect")} == {
        ("label-studio", "postgres"),
        ("postgres", "prefect"),
        ("label-studio", "worker"),
        ("prefect", "worker"),
        ("store", "worker"),
    }
    assert set(SERVICES["label-studio"]["networks"]) & set(SERVICES["prefect"]["networks"]) == {"database"}


def test_ports_are_open_on_loopback_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 3 and all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports), ports


def test_versions_are_exact_and_those_that_are_tested() -> None:
    images = {name: service["image"] for name, service in SERVICES.items() if name not in BUILT_HERE}
    assert [image for image in images.values() if not re.fullmatch(r"[\w/-]+:\d+\.\d+[\w.-]*", image)] == []
    assert images["label-studio"].endswith(f":{LABEL_STUDIO_VERSION}")
    assert images["prefect"].split(":")[1].split("-")[0] == str(pins()["prefect"])
    guide = GUIDE.read_text(encoding="utf-8")
    assert f"Label Studio {LABEL_STUDIO_VERSION}" in guide and f"Prefect {pins()['prefect']}" in guide
    assert f"PostgreSQL {images['postgres'].split(':')[1].split('.')[0]} " in guide


def test_secrets_are_read_from_files(tmp_path: Path) -> None:
    """Each `NAME_FILE` is a secret of its service, each secret is used, and the script makes all of them."""
    for name, service in SERVICES.items():
        named = {key: value for key, value in service["environment"].items() if key.endswith("_FILE")}
        assert {value.removeprefix("/run/secrets/") for value in named.values()} == set(service["secrets"]), name
        plain = {key for key in service["environment"] if re.search("PASSWORD|TOKEN|SECRET|AUTH", key)} - set(named)
        assert plain <= {"LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"}, name
    files = {name: DEPLOY / secret["file"] for name, secret in compose()["secrets"].items()}
    assert all(path == DEPLOY / "secrets" / name for name, path in files.items())
    made = make_secrets(tmp_path)
    assert made.keys() == files.keys()


def make_secrets(folder: Path) -> dict[str, str]:
    script = folder / "secrets.sh"
    script.write_bytes((DEPLOY / "secrets.sh").read_bytes())
    subprocess.run(["sh", str(script)], check=True, cwd="/")
    return {path.name: path.read_text(encoding="utf-8") for path in (folder / "secrets").iterdir()}


def test_the_script_makes_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    first = make_secrets(tmp_path)
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "other users of the machine do not get in"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}, "containers' users do"
    assert all(re.fullmatch(r"(al:)?[0-9a-f]{40}\n", secret) for secret in first.values())
    assert len(set(first.values())) == len(first)
    (folder / "store").unlink()
    second = make_secrets(tmp_path)
    assert {name for name in first if first[name] != second[name]} == {"store"}


def with_secrets(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(DEPLOY / "with-secrets.sh"), *words]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_command_finds_its_secrets_in_its_environment(tmp_path: Path) -> None:
    odd = """it's "a" $HOME `id` \\ %s é"""
    place = tmp_path / "secrets/one"
    place.parent.mkdir()
    place.write_text(odd + "\n", encoding="utf-8")
    told = with_secrets({"A_PASSWORD_FILE": str(place), "CONFIG_FILE": "/etc/x", "PLAIN": odd}, "env", "--null").stdout
    found = dict(line.split("=", 1) for line in told.rstrip("\0").split("\0"))
    assert found["A_PASSWORD"] == odd == found["PLAIN"]
    assert "A_PASSWORD_FILE" not in found and found["CONFIG_FILE"] == "/etc/x"
    assert with_secrets({}, "sh", "-c", 'printf "%s|" "$@"; exit 3', "-", "a b", "*").stdout == "a b|*|"
    assert with_secrets({}, "sh", "-c", "exit 3").returncode == 3


@pytest.mark.parametrize("content", [None, ""])
def test_without_its_secret_a_command_does_not_start(tmp_path: Path, content: str | None) -> None:
    place = tmp_path / "secrets/one"
    place.parent.mkdir()
    if content is not None:
        place.write_text(content, encoding="utf-8")
    done = with_secrets({"A_PASSWORD_FILE": str(place)}, "echo", "started")
    assert done.returncode and not done.stdout and str(place) in done.stderr


def test_a_domain_reaches_label_studio() -> None:
    def settings(**variables: str) -> list[str]:
        environment = compose(variables)["services"]["label-studio"]["environment"]
        names = ("LABEL_STUDIO_HOST", "LABEL_STUDIO_ALLOWED_HOSTS", "CSRF_TRUSTED_ORIGINS", "SESSION_COOKIE_SECURE")
        return [environment[name] for name in names]

    assert settings() == ["", "label-studio,127.0.0.1,localhost,localhost", "https://localhost", "0"]
    there = "https://labels.example.org"
    assert settings(LABEL_STUDIO_DOMAIN="labels.example.org", LABEL_STUDIO_SECURE_COOKIES="1") == [
        there, "label-studio,127.0.0.1,localhost,labels.example.org", there, "1",
    ]  # fmt: skip


def test_every_variable_and_service_of_the_guide_is_one_of_the_file() -> None:
    guide, text = GUIDE.read_text(encoding="utf-8"), (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    block = guide.split("`deploy/.env`:\n\n```\n")[1].split("```")[0]
    assert set(re.findall(r"(?m)^(\w+)=", block)) == set(re.findall(r"\$\{(\w+)", text))
    called = re.findall(r"docker compose (?:exec|run)(?: -T| --[\w-]+(?: tar)?)* ([\w-]+)", guide)
    called += re.findall(r"docker compose (?:stop|start) ([\w-]+)", guide)
    assert len(called) > 10 and set(called) <= set(SERVICES), called


def test_the_image_holds_what_it_copies_and_runs_as_nobody_special() -> None:
    lines = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1] if word[0] != "-"]
    assert set(copied) == set(kept) and all((ROOT / path).exists() for path in copied)
    assert "*" in ignored and not fnmatch.filter(kept, "*secrets/*")
    package = (ROOT / "setup.py").read_text(encoding="utf-8") + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {name for name in ("README.md", "LICENSE", "params.yaml", "dvc.yaml") if name in package} <= set(copied)
    [base] = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    after = lines[lines.index("USER al") :]
    assert not [line for line in after if line.startswith(("RUN", "COPY", "USER root"))]
    assert [line for line in after if line.startswith("ENTRYPOINT")] == ['ENTRYPOINT ["with-secrets"]']
