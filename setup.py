"""Puts the template of a workspace (the root's params.yaml and dvc.yaml) into the wheel; all else is pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTemplate(build_py):
    """The files that `al init` copies stand once, at the root; a wheel carries them in the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ("params.yaml", "dvc.yaml"):
                target = Path(self.build_lib, "al_pipeline/template", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildWithTemplate})
