"""Models built in `configure_model` under FSDP: on the meta device, with the values that one process would draw."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import paceline as pl
from paceline.strategies.initialise import repeat, views_of
from paceline.strategies.recording import Recording, recorded

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import WIDTH, Layered, batches, full_weights, strategy_of
from helpers.tiny import assert_same, tiny_trainer


class Late(Layered):
    """Built in `configure_model`; notes where, and what a rank held at most."""

    def __init__(self, **options: Any) -> None:
        super().__init__(late=True, **options)

    def configure_model(self) -> None:
        if not hasattr(self, "first"):
            super().configure_model()
            self.built_on = {p.device.type for p in self.parameters()}


class Attending(Late):
    """With torch's own attention, which initialises parameters of its children too, BatchNorm and buffers."""

    def build(self) -> None:
        super().build()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))[:, None]
        x = self.attention(x, x, x)[0][:, 0]
        for block in self.blocks:
            x = block(x)
        return self.last(x).mean(-1)


class Initialised(Late):
    """The model's own `init_weights`, applied at the end of the construction; parameters without a module."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Initialised):
            nn.init.normal_(module.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.last(x).mean(-1)


class Tried(Late):
    """A first forward pass while it is built gives a lazy layer its shape, and BatchNorm its statistics."""

    def build(self) -> None:
        super().build()
        example = torch.randn(4, self.first.in_features)
        self.first = nn.LazyLinear(WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self(example)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.last(x).mean(-1)


class OwnReset(Late):
    """A parameter of the module's own that its own method fills."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.empty(WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)


class Copied(Late):
    """Blocks that are copies of one, as in torch's own TransformerEncoder; an adapter; a parametrization; a buffer."""

    def build(self) -> None:
        super().build()
        self.blocks = nn.ModuleList(copy.deepcopy(self.blocks[0]) for _ in range(3))
        for block in self.blocks:
            weight_norm(block.up)
        self.adapter = nn.Parameter(torch.randn(WIDTH, 2) * 0.1)
        self.register_buffer("mask", torch.linspace(0, 1, WIDTH).round())
        self.register_buffer("table", torch.tensor([[1.0, 2.0]]))
        self.register_buffer("unknown", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.mask @ self.adapter @ self.table.mT
        for block in self.blocks:
            x = block(x)
        return self.last(x).mean(-1)


class Seeded(Late):
    """The random stream is another one for a while, and then for good; values that depend on those drawn."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            nn.init.trunc_normal_(self.blocks[0].up.weight)
        nn.init.orthogonal_(self.blocks[1].up.weight)
        self.blocks[2].up.weight.data.copy_(self.blocks[1].up.weight.T.reshape(2 * WIDTH, WIDTH) / 2)
        torch.manual_seed(2)
        nn.init.sparse_(self.last.weight, 0.5)


class Rewound(Late):
    """Random streams that are put back to where they were, or seeded alike several times."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng([]):
            nn.init.normal_(self.blocks[0].up.weight)
        nn.init.normal_(self.blocks[1].up.weight)
        generator = torch.Generator()
        for block in self.blocks:
            torch.manual_seed(2)
            nn.init.uniform_(block.up.bias)
            nn.init.normal_(block.down.bias, generator=generator.manual_seed(3))
        torch.manual_seed(4)


class Table(nn.Module):
    """Values that are neither parameters nor buffers, as metrics have them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = {"all": [torch.rand(WIDTH)]}
        self.made_on = torch.get_default_device()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.rows = {"all": [fn(self.rows["all"][0])]}
        fn(torch.zeros(1, device=self.made_on))
        return super()._apply(fn, recurse)


class Tabulated(Late):
    def build(self) -> None:
        super().build()
        self.table = Table()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table.rows["all"][0].sum()


class Loaded(Late):
    """Weights that are there when the model is built."""

    def build(self) -> None:
        super().build()
        self.first.load_state_dict(
            {"weight": torch.linspace(-0.2, 0.3, 4 * WIDTH).view(WIDTH, 4), "bias": torch.ones(WIDTH)}
        )


class Forgotten(Late):
    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.empty(WIDTH))


class ForgottenInPart(Late):
    def build(self) -> None:
        super().build()
        self.blocks[1].register_buffer("mask", torch.empty(3))
        self.blocks[1].mask[:2] = 1.0


class NeedsValues(Late):
    def build(self) -> None:
        super().build()
        if self.first.weight.sum() > 0:
            self.first.weight.data.neg_()


class ChoosesByValues(Late):
    def build(self) -> None:
        super().build()
        self.register_buffer("large", self.first.weight.detach()[self.first.weight > 0])


class DrawsTooEarly(Late):
    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
        nn.init.normal_(self.scale)


class NotesStart(pl.Callback):
    """Keeps the weights that training began with."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = full_weights(pl_module)
        self.buffers = {name: buffer.nan_to_num(-7.0) for name, buffer in pl_module.named_buffers()}
        self.after = torch.rand(3)


def fit_late(kind: type[Late], options: dict[str, Any], strategy: str | None, **trainer: Any) -> Any:
    pl.seed_everything(3, verbose=False)
    notes, module = NotesStart(), kind(sgd=True, **options)  # Adam makes large steps of small differences
    torch.manual_seed(5)  # Layered seeds in its constructor
    fitter = tiny_trainer(strategy=strategy_of(strategy, {}), callbacks=notes, global_batch_size=12, **trainer)
    fitter.fit(module, batches(24, 12 if strategy is None else 2))
    return notes.weights, full_weights(module), notes.buffers, notes.after, module.built_on


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Late, {}),
        (Late, {"tied": True}),
        (Late, {"frozen": ["first"]}),
        (Attending, {}),
        (Initialised, {}),
        (OwnReset, {}),
        (Tried, {}),
        (Copied, {}),
        (Seeded, {}),
        (Rewound, {}),
        (Loaded, {}),
        (Tabulated, {}),
    ],
)
@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 2)])
def test_a_model_built_late_starts_as_on_one_process(
    strategy: str, ranks: int, kind: type[Late], options: dict[str, Any]
) -> None:
    start, end, buffers, after, built_on = fit_late(kind, options, None)
    assert built_on == {"cpu"}
    for found_start, found_end, found_buffers, found_after, found_on in run_ranks(
        fit_late, ranks, kind, options, strategy
    ):
        assert found_on == {"meta"}
        assert_same(found_start, start)
        assert_same(found_buffers, buffers)
        assert torch.equal(found_after, after), "the random stream goes on from another place"
        if kind not in (Attending, Tried):  # BatchNorm sees micro-batches
            assert_same(found_end, end, 1e-6)


def test_a_model_built_late_in_bfloat16_is_the_float_one_rounded() -> None:
    (start, *_), (found, *_) = (
        fit_late(Late, {}, None, precision="bf16-true"),
        run_ranks(fit_late, 2, Late, {}, "fsdp", precision="bf16-true")[0],
    )
    assert_same(found, start)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgotten, "'scale' was built on the meta device and nothing initialises it. Give it values where Forgotten"),
        (ForgottenInPart, "'blocks.1.mask' was built on the meta device"),
        (DrawsTooEarly, "configure_model draws random numbers (normal_) for a tensor that was made on the CPU or by"),
        (NeedsValues, "configure_model reads values that are not there yet ("),
        (ChoosesByValues, "configure_model reads values that are not there yet ("),
    ],
)
def test_what_has_no_values_is_an_error_that_names_it(kind: type[Late], message: str) -> None:
    with pytest.raises(RanksFailed, match=re.escape(message)):
        run_ranks(fit_late, 2, kind, {}, "fsdp")


def peak_of_drawing(width: int) -> tuple[int, float]:
    """(tensors drawn, how many of them were in memory at most); each is drawn by its layer, then again at the end."""
    recording = Recording()
    with recorded(recording):
        stack = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
        stack.apply(lambda part: nn.init.normal_(part.weight) if isinstance(part, nn.Linear) else None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = in_memory("VmRSS")
    wanted = {view.memory for view in views_of(stack, recording).values()}
    drawn: list[int] = []
    repeat(recording, wanted, False, lambda memory, *_: drawn.append(memory))
    return len(drawn), (in_memory("VmHWM") - before) / (4 * width * width)


def in_memory(line: str) -> int:
    """Bytes, by what the kernel tells of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{line}:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to measure")
def test_one_tensor_at_a_time_is_in_memory() -> None:
    [(drawn, most)] = run_ranks(peak_of_drawing, 1, 3072)  # 36 MiB a matrix: more than what malloc keeps
    assert drawn == 4
    assert most < 1.5


def largest_allocation() -> int:
    """The most numbers in one parameter or buffer that a rank holds after construction."""
    module = Late()
    trainer = tiny_trainer(strategy="fsdp", max_steps=1)
    trainer.fit(module, batches(8, 2))
    return sum(p.to_local().numel() for p in module.parameters())


def test_each_rank_holds_its_share() -> None:
    shares = run_ranks(largest_allocation, 3)
    assert sum(shares) == 559
    assert max(shares) < 559 / 2
