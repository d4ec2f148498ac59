"""A small package with a model and a query strategy of one's own, built and installed by real tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from al_pipeline.plugins.packages import package_of

PLUG = "al_plug_test"


def project(folder: Path, version: str = "1.0.0", model: str = "LogisticRegression()") -> Path:
    """The sources of a package with a model and a strategy, each with an entry point."""
    package = folder / "src" / PLUG
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .models import make\nfrom .picks import pick\n")
    (package / "models.py").write_text(
        f"from sklearn.linear_model import LogisticRegression\n\n\ndef make():\n    return {model}\n"
    )
    (package / "picks.py").write_text("def pick(view, k, seed):\n    return list(range(k))\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "al-plug-test"\nversion = "{version}"\n'
        f'[project.entry-points."al_pipeline.models"]\nplug = "{PLUG}:make"\n'
        f'[project.entry-points."al_pipeline.strategies"]\nplug-first = "{PLUG}.picks:pick"\n'
    )
    return folder


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def wheel(folder: Path, version: str = "1.0.0", model: str = "LogisticRegression()") -> Path:
    """The package as a wheel in `folder`/shelf."""
    sources = project(folder / version, version, model)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder / "shelf", sources)
    return folder / f"shelf/{PLUG}-{version}-py3-none-any.whl"


def install(wheel: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a wheel in `site`, which this process and its children then look in."""
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    package_of.cache_clear()
    return site
