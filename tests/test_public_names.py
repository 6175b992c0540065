"""The names that load on first use: what users, type checkers and completion see of them is the same."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import paceline

ROOT = Path(__file__).resolve().parents[1]
LAZY = {
    "paceline": "__init__.py",
    "paceline.callbacks": "callbacks/__init__.py",
    "paceline.loggers": "loggers.py",
    "paceline.strategies": "strategies/__init__.py",
    "paceline.trainer": "trainer/__init__.py",
}
CONTRACT = {
    "paceline": "Trainer Module LightningModule DataModule LightningDataModule Callback CombinedLoader seed_everything "
    "rank_zero_only rank_zero_info rank_zero_warn __version__ PacelineError ConfigurationError UnknownArgumentError "
    "LaunchError CheckpointError",
    "paceline.callbacks": "Callback ModelCheckpoint EarlyStopping TQDMProgressBar RichProgressBar LearningRateMonitor "
    "Timer GradientAccumulationScheduler WeightAveraging BackboneFinetuning ModelSummary DeviceStatsMonitor "
    "ThroughputMonitor EMAWeightAveraging PredictionWriter BasePredictionWriter LambdaCallback Profiler "
    "OnExceptionCheckpoint StochasticWeightAveraging BaseFinetuning ProgressBar "
    "Logger JSONLLogger CSVLogger TensorBoardLogger WandbLogger",
    "paceline.loggers": "Logger JSONLLogger CSVLogger TensorBoardLogger WandbLogger",
    "paceline.strategies": "Strategy SingleDevice DDP FSDP HSDP register_strategy",
    "paceline.trainer": "Trainer Module DataModule Callback CombinedLoader seed_everything rank_zero_only "
    "rank_zero_info rank_zero_warn",
}


def all_of(module: str) -> list[str]:
    return list(importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", LAZY)
def test_the_public_names_are_those_of_the_contract(module: str) -> None:
    assert set(all_of(module)) == set(CONTRACT[module].split())


@pytest.mark.parametrize("module", LAZY)
def test_type_checkers_see_the_same_names_in_the_same_places_as_programs_do(module: str) -> None:
    tree = ast.parse((ROOT / LAZY[module]).read_text(encoding="utf-8"))
    checked, submodules = imports_for_type_checkers(tree)
    table, listed_submodules = table_for_programs(tree)
    assert checked == table
    assert submodules == listed_submodules
    assert {*table, "__version__"} == {*all_of(module), "__version__"}


def imports_for_type_checkers(tree: ast.Module) -> tuple[dict[str, str], set[str]]:
    places, submodules = {}, set()
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen_as = alias.asname or alias.name
            if node.module is None:
                submodules.add(seen_as)
            else:
                place = "." * node.level + node.module
                places[seen_as] = place if seen_as == alias.name else f"{place}:{alias.name}"
    return places, submodules


def table_for_programs(tree: ast.Module) -> tuple[dict[str, str], set[str]]:
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names")
    return ast.literal_eval(call.args[1]), set(ast.literal_eval(call.keywords[0].value) if call.keywords else ())


@pytest.mark.parametrize("module", LAZY)
def test_every_public_name_loads_and_is_listed(module: str) -> None:
    loaded = importlib.import_module(module)
    for name in CONTRACT[module].split():
        assert getattr(loaded, name) is not None
        assert name in dir(loaded)


def test_the_names_of_lightning_are_the_same_classes() -> None:
    assert paceline.LightningModule is paceline.Module
    assert paceline.LightningDataModule is paceline.DataModule
    assert paceline.callbacks.BasePredictionWriter is paceline.callbacks.PredictionWriter
    assert paceline.loggers.JSONLLogger is paceline.callbacks.JSONLLogger


def test_submodules_are_attributes_and_torch_stays_unloaded_until_a_name_needs_it() -> None:
    program = (
        "import sys, paceline as pl\n"
        "pl.callbacks, pl.loggers, pl.strategies, pl.trainer, pl.__version__, pl.errors.ConfigurationError\n"
        "dir(pl.callbacks), pl.CheckpointError\n"
        "assert 'torch' not in sys.modules\n"
        "pl.callbacks.Callback\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_wrong_name_is_an_attribute_error_that_says_the_nearest_right_one() -> None:
    with pytest.raises(
        AttributeError, match=r"^module 'paceline' has no attribute 'Trianer'\. Did you mean 'Trainer'\?$"
    ):
        paceline.Trianer
    with pytest.raises(AttributeError, match="Did you mean 'EarlyStopping'"):
        paceline.callbacks.EarlyStoping
    with pytest.raises(AttributeError, match="Did you mean 'loggers'"):
        paceline.logger


def test_a_name_like_no_other_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(AttributeError, match="It has: DDP, FSDP, HSDP, SingleDevice, Strategy, register_strategy"):
        paceline.strategies.quux


def test_a_private_name_is_refused_without_a_search() -> None:
    assert not hasattr(paceline, "__wrapped__")
    assert getattr(paceline, "_trainer", None) is None


def test_the_printed_traceback_of_a_wrong_name_has_the_advice_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import paceline; paceline.Trianer"], capture_output=True, text=True, timeout=60
    )
    assert done.stderr.count("Did you mean") == 1
