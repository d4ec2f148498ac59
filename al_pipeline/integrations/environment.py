"""Install a recorded engine that is not the running one, in a virtual environment of its own.

A record holds the versions of an engine and of the packages of plug-ins, and the digest of its sources. Other versions
can be installed; other sources must be given as a checkout or a wheel; another Python or CPU cannot be provided. An
installed engine is used only if its own fingerprint is the recorded one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import al_pipeline
from al_pipeline.errors import BadInput, ExternalServiceError, NothingToDo
from al_pipeline.files import json_line, read_json, sha256_bytes
from al_pipeline.integrations import processes as child
from al_pipeline.workspace.fingerprint import FORMER_PACKAGES, PACKAGES, STAGE_ENVIRONMENT, current_engine, difference
from al_pipeline.workspace.home import SECRET_VARIABLES, al_home, check_private, own_environment, private_folder
from al_pipeline.workspace.lock import locked

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,60}|absent")
"""A version that pip accepts, or `absent`. A record may come from anyone, and what it names is installed: check it."""
_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z._-]{0,98}[0-9A-Za-z])?")
_INSTALL_SECONDS = 3600.0
_LOOK_SECONDS = 600.0
_LOOK = (
    "import sys; from pathlib import Path; from al_pipeline.workspace.fingerprint import current_engine; "
    "from al_pipeline.files import write_json; write_json(Path(sys.argv[1]), current_engine())"
)
_GIVEN = ("python", "machine", "cpu", "threads")
"""Properties of the machine and of the Python that runs `al`, which no package can change."""


@dataclass(frozen=True)
class Engine:
    """An environment in which stages run under another engine."""

    python: Path
    blas: str
    """The kernels that its BLAS is told to use; empty lets it choose."""

    @property
    def library(self) -> Path:
        """The folder of the packages that this environment has of its own."""
        (library,) = self.python.parents[1].glob("lib/python*/site-packages")
        return library

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which `python -m al_pipeline.stages...` runs this engine: its PATH first, no PYTHONPATH."""
        path = os.pathsep.join([str(self.python.parent), os.environ.get("PATH", "")])
        return {"PATH": path, "PYTHONPATH": "", "OPENBLAS_CORETYPE": self.blas}

    def remove(self) -> None:
        """Delete the environment; the next call installs it anew."""
        shutil.rmtree(self.python.parents[1], ignore_errors=True)


def recorded_engine(
    recorded: Mapping[str, Any],
    sources: Path | None,
    on_progress: Callable[[str], None],
    plugins: Mapping[str, str] | None = None,
) -> Engine:
    """Return the engine that `recorded` describes; create its environment in `al`'s home if it is missing.

    `sources`: a checkout or wheel of al-pipeline, needed if the running sources are not the recorded ones. Packages of
    the same version as here are shared with the running environment. `plugins`: the versions of plug-ins' packages that
    it is to have of its own, by name. Raises NothingToDo if that engine cannot run on this machine or needs sources,
    BadInput if the record is invalid or `sources` are missing or not the recorded ones, ExternalServiceError if pip
    fails.
    """
    wanted, plugins = dict(recorded), dict(sorted((plugins or {}).items()))
    _check_possible(wanted, sources)
    _check_names(plugins)
    key = {**wanted, "plugins": plugins} if plugins else wanted
    folder = al_home() / "engines" / sha256_bytes(json_line(key).encode())[:12]
    engine = Engine(folder / "bin/python", str(wanted["blas"]))
    check_private(folder)  # its contents are executed
    with locked(folder.with_suffix(".lock"), "al reproduce --engine"):
        child.end_remembered(folder.with_suffix(".json"))
        if _lacking(engine, plugins) or difference(wanted, _fingerprint(engine, folder) or {}):
            on_progress("installing the recorded engine in an environment of its own (once)")
            _install(folder, engine, wanted, plugins, sources)
            found = _fingerprint(engine, folder)
            if changes := difference(wanted, found or {}):
                shutil.rmtree(folder)
                raise BadInput(f"the installed versions differ from the recorded engine: {changes}")
    return engine


def _check_possible(wanted: Mapping[str, Any], sources: Path | None) -> None:
    here = current_engine()
    packages = wanted.get("packages")
    known = packages if isinstance(packages, dict) and set(packages) <= {*PACKAGES, *FORMER_PACKAGES} else {"": None}
    if not all(isinstance(v, str) and _VERSION.fullmatch(v) for v in known.values()):
        raise BadInput(f"the record names invalid packages or versions: {packages!r}"[:300])
    if other := [key for key in _GIVEN if wanted.get(key) != here[key]]:
        differences = "; ".join(f"{key}: was {wanted.get(key)}, is {here[key]}" for key in other)
        raise NothingToDo(
            f"the recorded engine cannot be installed here ({differences}); run `al` on a machine with that Python "
            "and platform, or leave `--engine` out to compare metrics only"
        )
    if sources is None and wanted["sources"] != here["sources"]:
        raise NothingToDo(
            f"the round was made by other sources of al-pipeline (version {wanted['version']}, digest "
            f"{wanted['sources'][:12]}; here: {here['version']}, {here['sources'][:12]}), of which a record holds "
            "only the digest; name a checkout or a wheel of them with `--engine PATH`"
        )
    if sources is not None and not sources.exists():
        raise BadInput(f"{sources} is neither a checkout nor a wheel of al-pipeline: there is no such file or folder")


def _check_names(plugins: Mapping[str, str]) -> None:
    for name, version in plugins.items():
        if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
            raise BadInput(
                f"the record names an invalid package of a plug-in or its version: {name!r} {version!r}"[:300]
            )


def _lacking(engine: Engine, plugins: Mapping[str, str]) -> bool:
    """Whether the environment lacks the version of a plug-in's package."""
    if not plugins or not engine.python.exists():
        return bool(plugins)
    path = [str(engine.library)]
    return any(
        version not in {one.version for one in distributions(name=name, path=path)} for name, version in plugins.items()
    )


def _install(
    folder: Path, engine: Engine, wanted: Mapping[str, Any], plugins: Mapping[str, str], sources: Path | None
) -> None:
    """Create an environment with the packages that differ; the others are imported from the running environment."""
    here = current_engine()["packages"]
    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder)
    venv.create(folder, symlinks=True, with_pip=False)
    lines = [] if sources else [str(Path(al_pipeline.__file__).parents[1])]
    lines += [f"import site; site.addsitedir({path!r})" for path in _site_packages()]  # with what is editable there
    (engine.library / "shared.pth").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(engine.python), "--disable-pip-version-check", "--no-input"]
    other = [f"{name}=={v}" for name, v in wanted["packages"].items() if v not in (here.get(name), "absent")]
    if other:
        _run(
            [*pip, "install", "--only-binary", ":all:", *other],
            engine,
            folder,
            f"pip could not install {', '.join(other)}",
        )
    for name, version in plugins.items():
        _install_plugin(pip, engine, folder, wanted["packages"], name, version)
    if sources:
        source = sources.resolve()
        if source.is_dir():  # building leaves files behind, so build in a copy of the user's checkout
            source = folder / "sources"
            shutil.copytree(sources, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
        isolated = [] if find_spec("setuptools") is None else ["--no-build-isolation"]
        command = [*pip, "install", "--no-deps", *isolated, str(source)]
        _run(command, engine, folder, f"pip could not install {sources}")


def _install_plugin(
    pip: Sequence[str], engine: Engine, folder: Path, packages: Mapping[str, str], name: str, version: str
) -> None:
    """Install the package, after what it needs that is not shared; even if the one that is shared has its version."""
    package = f"{name}=={version}"
    failed = (
        f"pip could not install {package}, which the round's plug-ins need; put its wheel into a folder and name that "
        "in PIP_FIND_LINKS, or install that version into the environment of `al`, or leave `--engine` out to compare "
        "metrics only"
    )
    engines = [f"{one}=={known}" for one, known in packages.items() if known != "absent"]
    command = [*pip, "install", "--only-binary", ":all:"]
    _run([*command, package, *engines], engine, folder, failed)
    if _lacking(engine, {name: version}):
        _run([*command, "--no-deps", "--ignore-installed", package], engine, folder, failed)


def _site_packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def _fingerprint(engine: Engine, folder: Path) -> dict[str, Any] | None:
    """The fingerprint that the environment reports; None if it is missing or does not work."""
    if not engine.python.exists():
        return None
    path = folder / "engine.json"
    path.unlink(missing_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        environment = {**_inherited(), **STAGE_ENVIRONMENT, **engine.environment}
        command = [str(engine.python), "-c", _LOOK, str(path)]
        child.run(command, folder, environment, folder.with_suffix(".json"), _LOOK_SECONDS, log)
    found: dict[str, Any] | None = read_json(path)
    return found


def _inherited() -> dict[str, str]:
    """Our environment without our secrets: installed packages may run third-party code."""
    inherited = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    return {**inherited, **own_environment()}


def _run(command: Sequence[str], engine: Engine, folder: Path, failed: str) -> None:
    path = folder.with_suffix(".log")
    with path.open("ab") as log:
        environment = {**_inherited(), **engine.environment}
        code = child.run(command, folder, environment, folder.with_suffix(".json"), _INSTALL_SECONDS, log)
    if code != 0:
        said = " ".join(path.read_text(encoding="utf-8", errors="replace").split())[-500:]
        raise ExternalServiceError(f"{failed} ({'too slow' if code is None else code}; its log is {path}): {said}")
