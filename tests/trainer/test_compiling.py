"""`Trainer(compile=...)`: what is compiled, that it trains the same, and that no step compiles anything anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paceline as pl
from paceline.errors import ConfigurationError

from helpers.ranks import run_ranks
from helpers.tiny import FEATURES, Regression, assert_same, loader, tiny_trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.relu(self.up(inputs)))


class Deep(Regression):
    """Logs in its forward, which `compile=True` compiles."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.blocks = nn.Linear(FEATURES, 4), nn.ModuleList(Block() for _ in range(3))
        self.layer = nn.Linear(4, 1)
        self.unused = nn.Dropout()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.first(inputs)
        for block in self.blocks:
            outputs = block(outputs)
        outputs = super().forward(outputs)
        self.log("largest", outputs.max(), on_step=True, on_epoch=True, reduce_fx="max")
        return outputs


def compiled_parts(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if part._compiled_call_impl is not None}


def trained(compile: Any = False, count: int = 24, **arguments: Any) -> tuple[pl.Module, dict[str, float]]:  # noqa: A002
    module, trainer = Deep(), tiny_trainer(compile=compile, **{"max_epochs": 1, **arguments})
    trainer.fit(module, loader(count, batch_size=2))
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


class Counting:
    """A backend that compiles nothing, and counts what it was given to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (False, set()),
        ({"backend": "eager"}, {"", "first", "layer", "blocks.0", "blocks.1", "blocks.2"}),
        ("blocks", {"blocks.0", "blocks.1", "blocks.2"}),
    ],
    ids=str,
)
def test_forwards_are_compiled_in_place(how: Any, expected: set[str]) -> None:
    module = Deep()
    names = list(module.state_dict())
    tiny_trainer(compile=how, max_steps=0).fit(module, loader(2))
    assert compiled_parts(module) == expected
    assert list(module.state_dict()) == names


def test_a_module_without_a_forward_has_its_layers_compiled() -> None:
    class Stepping(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Stepping()
    tiny_trainer(compile={"backend": "eager"}, max_steps=1).fit(module, loader(2))
    assert compiled_parts(module) == {"layer"}


def test_a_module_that_torch_compile_has_wrapped_is_trained_compiled() -> None:
    module, backend = Deep(), Counting()
    tiny_trainer(max_epochs=1).fit(torch.compile(module, backend=backend), loader(6))
    assert backend.graphs > 0
    assert_same(module, trained(count=6)[0])


def test_what_is_compiled_already_stays_as_it_is() -> None:
    module = Deep()
    module.first.compile(backend="eager")
    own = module.first._compiled_call_impl
    for _ in range(2):
        tiny_trainer(compile={"backend": "eager"}, max_steps=0).fit(module, loader(2))
    assert module.first._compiled_call_impl is own


def test_a_compiled_module_trains_and_logs_as_one_that_is_not() -> None:
    plain, metrics = trained()
    module, logged = trained({"backend": "aot_eager"})
    assert_same(module, plain)
    assert logged == metrics
    assert {"largest", "largest_step", "largest_epoch"} <= set(logged)


def test_no_step_compiles_anything_anew() -> None:
    graphs = []
    for count in (12, 60):
        torch._dynamo.reset()
        backend = Counting()
        trained({"backend": backend}, count)
        graphs.append(backend.graphs)
    assert graphs[0] == graphs[1] > 0


def trained_on_rank(strategy: str) -> dict[str, Tensor]:
    module, how = Deep(), {"backend": "aot_eager"}
    trainer = tiny_trainer(compile=how, strategy=strategy, devices=2, max_epochs=1, global_batch_size=4)
    trainer.fit(module, loader(24, batch_size=2))
    assert compiled_parts(module)
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_with_compiled_modules_train_as_one_process_without(strategy: str) -> None:
    plain, _ = trained(global_batch_size=4)
    for weights in run_ranks(trained_on_rank, 2, strategy):
        assert_same(weights, plain, 1e-6)


@pytest.mark.parametrize(
    ("how", "module", "told"),
    [
        ("all", Deep, "compile='all': use True, 'blocks'"),
        ("blocks", Regression, "no layers that repeat. Use compile=True"),
    ],
)
def test_what_cannot_be_compiled_is_refused(how: Any, module: Any, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        tiny_trainer(compile=how, max_steps=1).fit(module(), loader(2))
