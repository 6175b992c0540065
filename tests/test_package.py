"""The wheel, built from the source distribution, is complete, and works without the checkout and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import pytest

import paceline

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "venv", "build", "dist", "*.egg-info", "runs", "wandb", "__pycache__", ".*_cache", ".hypothesis"
)


class Built(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions; the folder's name and stale builds in the checkout have no part in them."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "some-checkout", ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "some-checkout", cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that has the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built.wheel, cwd=folder)
    return python


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command as if no checkout were near and return what it printed; its output is the error's message."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def sources() -> set[str]:
    """The files of the packages that setup.cfg lists, as the wheel names them."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = config["options"]["packages"].split()
    folders = {name: ROOT.joinpath(*name.split(".")[1:]) for name in names}
    return {f"{name.replace('.', '/')}/{file.name}" for name, folder in folders.items() for file in folder.glob("*.py")}


def test_every_folder_of_the_package_is_listed_in_setup_cfg() -> None:
    inside = ("callbacks", "strategies", "trainer")
    found = {
        f"paceline/{file.relative_to(ROOT).as_posix()}" for folder in inside for file in (ROOT / folder).rglob("*.py")
    }
    assert found <= sources()


def test_the_wheel_holds_every_module_the_type_marker_and_nothing_else(built: Built) -> None:
    names = {name for name in zipfile.ZipFile(built.wheel).namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.startswith(f"paceline-{paceline.__version__}.dist-info/")}
    assert names - metadata == sources() | {"paceline/py.typed"}
    assert f"paceline-{paceline.__version__}.dist-info/licenses/LICENSE" in metadata


def test_the_source_distribution_holds_the_tests_the_examples_and_the_licence(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.cfg", "pyproject.toml", "py.typed"} <= names
    assert {"tests/test_package.py", "tests/helpers/ranks.py", "examples/quickstart.py"} <= names


def test_the_wheel_imports_without_torch_and_without_the_checkout(python: Path, tmp_path: Path) -> None:
    program = (
        "import sys, paceline as pl, importlib.metadata as metadata\n"
        "assert metadata.version('paceline') == pl.__version__\n"
        "assert pl.__file__.startswith(sys.prefix), pl.__file__\n"
        "assert issubclass(pl.errors.ConfigurationError, ValueError) and 'ModelCheckpoint' in dir(pl.callbacks)\n"
        "try:\n"
        "    pl.Trainer\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    assert run(python, "-c", program, cwd=tmp_path) == "No module named 'torch'\n"


def test_every_public_name_of_the_wheel_loads_where_the_dependencies_are(python: Path, tmp_path: Path) -> None:
    program = (
        "import sys, paceline as pl\n"
        "for module in (pl, pl.callbacks, pl.loggers, pl.strategies, pl.trainer):\n"
        "    for name in module.__all__:\n"
        "        getattr(module, name)\n"
        "assert pl.Trainer.__module__ == 'paceline.trainer.trainer'\n"
        "outside = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'paceline'\n"
        "           and not m.__file__.startswith(sys.prefix)]\n"
        "assert not outside, outside\n"
    )
    # The folder of this environment's packages, without its .pth files: an editable install of ours is not seen.
    run(python, "-c", program, cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))


def test_the_wheel_brings_the_command_line(python: Path, tmp_path: Path) -> None:
    packages = sysconfig.get_path("purelib")
    assert "launch" in run(python.parent / "paceline", "--help", cwd=tmp_path, PYTHONPATH=packages)
