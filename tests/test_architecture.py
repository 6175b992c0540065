"""The rules that hold the parts apart: who may import whom, what importing may do, and what it may cost."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


def packages() -> dict[str, Path]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = config["options"]["packages"].split()
    return {name: ROOT.joinpath(*name.split(".")[1:]) for name in names}


# Every module of ours and its file; a package goes by its own name.
MODULES = {
    package if file.stem == "__init__" else f"{package}.{file.stem}": file
    for package, folder in packages().items()
    for file in sorted(folder.glob("*.py"))
}


class Import(NamedTuple):
    target: str  # the module, or the attribute of one, in full
    relative: bool
    where: str  # file:line


# --- who may import whom --------------------------------------------------------------------------------------------
# What the modules below a package may import of ours. Imports for annotations (`if TYPE_CHECKING:`) are free.
MAY_IMPORT = {
    "paceline.strategies": {"paceline.strategies", "paceline.errors", "paceline._lazy"},
    "paceline.trainer": {"paceline.trainer", "paceline.errors", "paceline._lazy", "paceline.__version__"},
    "paceline.callbacks": {"paceline.callbacks", "paceline.trainer", "paceline.errors", "paceline._lazy"},
    "paceline": {"paceline._lazy", "paceline.errors"},
}
EDGE = "paceline.trainer.trainer"  # the one module that knows both sides


def runtime_imports(module: str) -> Iterator[Import]:
    """Every import that running the module or its functions carries out."""
    file = MODULES[module]
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in runtime_nodes(ast.parse(file.read_text(encoding="utf-8"))):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, False, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = node.level > 0
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package if relative else None)
            yield from (Import(f"{source}.{alias.name}", relative, where) for alias in node.names)


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without the blocks that only type checkers read."""
    yield node
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from runtime_nodes(child)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def our_imports() -> Iterator[tuple[str, Import]]:
    for module in MODULES:
        yield from ((module, found) for found in runtime_imports(module) if is_within(found.target, "paceline"))


def test_imports_go_from_callbacks_to_trainer_and_only_the_edge_knows_the_strategies() -> None:
    wrong = []
    for module, found in our_imports():
        allowed = MAY_IMPORT[next(area for area in MAY_IMPORT if is_within(module, area))]
        if module == EDGE:
            allowed = allowed | {"paceline.callbacks", "paceline.strategies"}
        if not any(is_within(found.target, package) for package in allowed):
            wrong.append(f"{found.where} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_nothing_of_ours_imports_the_edge() -> None:
    assert [found.where for _, found in our_imports() if is_within(found.target, EDGE)] == []


def test_imports_inside_the_package_are_relative() -> None:
    assert [found.where for _, found in our_imports() if not found.relative] == []


def test_strategies_need_nothing_but_torch() -> None:
    others = [
        f"{found.where} imports {found.target}"
        for module in MODULES
        if is_within(module, "paceline.strategies")
        for found in runtime_imports(module)
        if found.target.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "paceline"}
    ]
    assert not others, "\n".join(others)


def test_the_root_holds_no_module_by_accident() -> None:
    """The repository's root is the package's: a script left there would be installed with it."""
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "_lazy.py", "errors.py", "loggers.py"}


# --- what importing does --------------------------------------------------------------------------------------------
# Prints, as JSON, what an import could change in a process, before and after all of our modules were imported.
WATCH = """
import atexit, importlib, json, locale, logging, os, random, signal, sys, threading, warnings
import torch

def state():
    loggers = {name: logging.getLogger(name) for name in [*logging.root.manager.loggerDict]}
    return {
        "log handlers": sorted(f"{n}: {h}" for n, l in {"root": logging.root, **loggers}.items() for h in l.handlers),
        "log levels": sorted(f"{n}: {l.level}" for n, l in loggers.items() if n.startswith("paceline") and l.level),
        "signal handlers": {str(s): str(signal.getsignal(s)) for s in sorted(signal.valid_signals())},
        "wakeup fd": wakeup_fd(),
        "threads": sorted(t.name for t in threading.enumerate()),
        "exit functions": atexit._ncallbacks(),
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(sys.displayhook)],
        "streams": [id(sys.stdout), id(sys.stderr)],
        "environment": dict(os.environ),
        "import path": sys.path,
        "warning filters": [str(f) for f in warnings.filters],
        "locale": locale.setlocale(locale.LC_ALL),
        "random state": hash(random.getstate()),
        "torch random state": hash(tuple(torch.get_rng_state().tolist())),
        "torch settings": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
                           torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()],
        "devices": [torch.cuda.is_initialized(), torch.distributed.is_initialized()],
    }

def wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return fd

before = state()
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
after = state()
print(json.dumps([before, after]))
"""


def run_python(program: str, *arguments: str) -> str:
    """What the program printed, run in a fresh interpreter away from the checkout; it may print nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=sys.prefix,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_map_of_the_trainer_has_every_module() -> None:
    doc = ast.get_docstring(ast.parse(MODULES["paceline.trainer"].read_text())) or ""
    names = [name.strip(" /") for line in doc.splitlines() for name in line[21:].split(",") if line[:4] == "    "]
    folder = ROOT / "trainer"
    found = [path.stem for path in folder.glob("*.py")] + [path.parent.name for path in folder.glob("*/__init__.py")]
    assert sorted(filter(None, names)) == sorted(set(found) - {"__init__"})


def test_importing_every_module_prints_nothing_and_changes_nothing() -> None:
    (line,) = run_python(WATCH, json.dumps(list(MODULES))).splitlines()
    before, after = json.loads(line)
    assert after == before


# --- one module, one name -------------------------------------------------------------------------------------------
def names_by_file() -> dict[str, set[str]]:
    """The names under which this process has imported each file of ours."""
    ours = {str(file.resolve()): set[str]() for file in MODULES.values()}
    for name, module in list(sys.modules.items()):
        file = os.path.realpath(getattr(module, "__file__", None) or "")
        if file in ours and name != "__main__":
            ours[file].add(name)
    return ours


def check_names() -> None:
    expected = {str(file.resolve()): name for name, file in MODULES.items()}
    wrong = {file: names for file, names in names_by_file().items() if names - {expected[file]}}
    assert not wrong, f"imported under other names than paceline.*: {wrong}"


@pytest.fixture(scope="session")
def checked_when_all_tests_are_over() -> Iterator[None]:
    yield
    check_names()


@pytest.mark.usefixtures("checked_when_all_tests_are_over")
def test_no_module_of_ours_is_imported_under_two_names() -> None:
    """pytest imports files by their place in the checkout; the fixture looks again when all tests are over."""
    import paceline

    assert Path(paceline.__file__).resolve() == ROOT / "__init__.py", "the tests run against another paceline"
    check_names()


# --- what importing costs -------------------------------------------------------------------------------------------
# Parts of torch that `import torch` leaves out, each tens of milliseconds to seconds.
HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.tensorboard",
]


@cache
def loaded_by(program: str) -> frozenset[str]:
    """The modules in memory after the program, which may use `pl` once it has imported it."""
    return frozenset(json.loads(run_python(f"{program}\nimport json, sys; print(json.dumps(sorted(sys.modules)))")))


def test_importing_paceline_loads_next_to_nothing() -> None:
    new = loaded_by("import paceline") - loaded_by("import importlib, typing")
    assert new == {"paceline", "paceline._lazy"}


@pytest.mark.parametrize("program", ["pl.Trainer", "pl.Trainer(max_epochs=1)"])
def test_a_trainer_loads_nothing_heavy_beyond_what_torch_loads(program: str) -> None:
    new = loaded_by(f"import paceline as pl\n{program}") - loaded_by("import torch")
    origins = {name: name.partition(".")[0] for name in sorted(new)}
    assert set(origins.values()) - sys.stdlib_module_names <= {"paceline", "torch"}
    assert [name for name in new if any(is_within(name, heavy) for heavy in HEAVY)] == []
    of_torch = [name for name, origin in origins.items() if origin == "torch"]
    assert len(of_torch) <= 10, of_torch
    of_python = [name for name, origin in origins.items() if origin in sys.stdlib_module_names]
    assert len(of_python) <= 30, of_python
