"""FSDP and HSDP on real ranks: the weights of one process, however parameters, batches and windows are cut."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paceline.strategies import FSDP, HSDP

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import Block, Layered, batches, full_weights, strategy_of, trained, trained_on_ranks
from helpers.tiny import assert_same, tiny_trainer

TOLERANCE = 1e-6
CUT = {"count": 20, "batch_size": 2, "global_batch_size": 8}  # windows of 8, 8 and 4 in micro-batches of at most 2


def one_process(model: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Tensor]:
    return trained(20, batch_size=8, model=model, **trainer)


def assert_like_one_process(results: list[dict[str, Tensor]], one: dict[str, Tensor]) -> None:
    for weights in results:
        assert_same(weights, one, TOLERANCE)


# --- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 2)])
def test_windows_cut_over_ranks_and_micro_batches_train_as_on_one_process(
    strategy: str, ranks: int, every: bool
) -> None:
    results = run_ranks(trained_on_ranks, ranks, strategy, {"sync_every_micro_batch": every}, max_epochs=2, **CUT)
    assert_like_one_process(results, one_process(max_epochs=2))


@pytest.mark.parametrize("every", [True, False])
def test_hsdp_of_two_groups_of_two_trains_as_one_process(every: bool) -> None:
    options = {"shard": 2, "sync_every_micro_batch": every}
    results = run_ranks(trained_on_ranks, 4, "hsdp", options, max_epochs=2, **CUT)
    assert "over 2x2 ranks" in results.outputs[0]
    cost = "every rank keeps all 0.0 MB of gradients within a window of several micro-batches"
    assert (cost in results.outputs[0]) is not every
    assert_like_one_process(results, one_process(max_epochs=2))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize(("strategy", "ranks", "options"), [("fsdp", 3, {}), ("hsdp", 4, {"shard": 2})])
def test_clipping_is_that_of_one_process(strategy: str, ranks: int, options: dict[str, Any], algorithm: str) -> None:
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    model = {"sgd": True}  # Adam would forgive a wrong scale
    results = run_ranks(trained_on_ranks, ranks, strategy, options, model=model, **clipping, **CUT)
    one = one_process(model, **clipping)
    assert_like_one_process(results, one)
    unclipped = one_process(model)
    assert max((one[name] - unclipped[name]).abs().max() for name in one) > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        {"tied": True},
        {"frozen": ["first", "blocks.1"]},
        {"frozen": ["blocks.0.up"]},
        {"groups": True},
        {"sgd": True},
        {"fused": True},
    ],
    ids=str,
)
def test_models_of_all_kinds_train_as_on_one_process(model: dict[str, Any]) -> None:
    assert_like_one_process(run_ranks(trained_on_ranks, 2, "fsdp", model=model, **CUT), one_process(model))


@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": False},
        {"reshard_after_forward": True, "forward_prefetch": 2},
        {"activation_checkpointing": True},
        {"cpu_offload": True},
        {"blocks": ["Linear"]},
        {"blocks": "blocks"},
        {"blocks": [Block, "Linear"]},
        {"blocks": ["blocks.0", "blocks.2"]},
    ],
    ids=str,
)
def test_options_change_no_weight(options: dict[str, Any]) -> None:
    assert_like_one_process(run_ranks(trained_on_ranks, 2, "fsdp", options, **CUT), one_process())


def dropout_with_and_without_checkpointing() -> list[dict[str, Tensor]]:
    return [
        trained_on_ranks("fsdp", {"activation_checkpointing": on}, model={"dropout": 0.5}, **CUT)
        for on in (False, True)
    ]


def test_activation_checkpointing_computes_again_with_the_same_dropout() -> None:
    for plain, checkpointed in run_ranks(dropout_with_and_without_checkpointing, 2):
        assert_same(plain, checkpointed)


def test_what_was_sharded_is_told_once() -> None:
    results = run_ranks(trained_on_ranks, 2, "fsdp", **CUT)
    line = "FSDP: 559 parameters over 2 ranks in 3 x Block (blocks.0 ... blocks.2) and the rest"
    assert [output.count(line) for output in results.outputs] == [1, 0]


class Unlike(Layered):
    """No layer comes twice, and it is large enough for its building to cost memory."""

    def build(self) -> None:
        self.first = nn.Linear(4, 5_100_000)
        self.flat = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.first(x)).mean(-1)


class Sharing(Layered):
    """The blocks share a layer."""

    def build(self) -> None:
        super().build()
        self.blocks[2].up = self.blocks[0].up


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            Unlike,
            "in one block, since no layers repeat: all of it is gathered at once. Name layers with FSDP(",
        ),
        (Unlike, "every rank built all 0.1 GB of it first, build it in configure_model to avoid that"),
        (Sharing, "FSDP: blocks.0, blocks.2 share parameters with other parts of the model, so they are gathered with"),
    ],
)
def test_what_costs_memory_is_told_once(kind: type[Layered], line: str) -> None:
    outputs = run_ranks(evaluates, 2, kind).outputs
    assert [output.count(line) for output in outputs] == [1, 0]


def evaluates(kind: type[Layered]) -> None:
    tiny_trainer(strategy="fsdp").test(kind(), batches(4, 2), verbose=False)


class Parallelized(Layered):
    """Shards one block itself."""

    def parallelize(self, mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.blocks[1], mesh=mesh)


def fit_of(kind: type[Layered]) -> dict[str, Tensor]:
    return trained(module=kind(), strategy="fsdp", **CUT)


def test_a_module_may_shard_its_parts_itself() -> None:
    assert_like_one_process(run_ranks(fit_of, 2, Parallelized), one_process())


# --- precision ------------------------------------------------------------------------------------------------------
class Dtypes(Layered):
    """Notes the types that a step sees."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = (self.first.weight.dtype, self.first(batch[0]).dtype, batch[1].dtype)
        return self.loss(batch)


def dtypes_of(precision: str) -> Any:
    module = Dtypes(sgd=True)  # Adam makes large steps of small differences
    weights = trained(module=module, strategy="fsdp", precision=precision, **CUT)
    return module.seen, {p.dtype for p in module.parameters()}, weights


def test_bf16_mixed_computes_in_bfloat16_with_float32_masters_and_leaves_the_batch_alone() -> None:
    seen, masters, weights = run_ranks(dtypes_of, 2, "bf16-mixed")[0]
    assert seen == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert masters == {torch.float32}
    assert_same(weights, one_process({"sgd": True}, precision="bf16-mixed"), 0.01)


def test_bf16_true_keeps_everything_in_bfloat16() -> None:
    seen, masters, _ = run_ranks(dtypes_of, 2, "bf16-true")[0]
    assert (seen, masters) == ((torch.bfloat16,) * 3, {torch.bfloat16})


class Overflows(Layered):
    """One gradient of the second window is infinite, in the shard of one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss + self.first.weight[0, 0] * 1e38 * 1e3 if self.global_step == 1 else loss


def fp16(strategy: str, batch_size: int) -> Any:
    module, trainer = Overflows(sgd=True), tiny_trainer(strategy=strategy, precision="16-mixed", global_batch_size=8)
    trainer.fit(module, batches(20, batch_size))
    assert trainer.strategy.scaler is not None
    return trainer.global_step, trainer.strategy.scaler.get_scale(), full_weights(module)


def test_fp16_scales_for_all_ranks_and_skips_the_step_that_overflows_on_one() -> None:
    steps, scale, weights = fp16("auto", 8)
    assert steps < 3
    for result in run_ranks(fp16, 2, "fsdp", 4):
        assert result[:2] == (steps, scale)
        assert_same(result[2], weights, 0.01)


class CastByHand(Layered):
    """Casts the inputs of the layers outside blocks itself; notes whether a block runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        def note(*_: Any) -> None:
            self.in_block = torch.is_autocast_enabled("cpu"), self.blocks[0].norm.weight.dtype

        with self.blocks[0].norm.register_forward_hook(note):
            return super().forward(x.to(self.first.weight.dtype)).float()


def in_a_block(autocast: bool) -> Any:
    module = CastByHand(sgd=True)
    weights = trained(module=module, strategy=FSDP(autocast=autocast), precision="bf16-mixed", **CUT)
    return module.in_block, weights


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_precision_is_left_to_the_gathered_weights_where_autocast_is_not_wanted(autocast: bool) -> None:
    in_block, weights = run_ranks(in_a_block, 2, autocast)[0]
    assert in_block == (autocast, torch.bfloat16)
    assert_same(weights, one_process({"sgd": True}, precision="bf16-mixed"), 0.01)


# --- evaluation -----------------------------------------------------------------------------------------------------
class Evaluated(Layered):
    """Counts what its metric saw, and predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        self.log("test_loss", self.loss(batch))
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


def evaluated(count: int, strategy: FSDP | str) -> Any:
    module = Evaluated()
    trainer = tiny_trainer(strategy=strategy)
    results = trainer.test(module, batches(count, 2), verbose=False)
    calls = module.calls
    predictions = torch.cat(trainer.predict(module, batches(count, 2)))
    sharded = all(hasattr(p, "placements") for p in module.parameters())
    return results, calls, predictions, sharded


@pytest.mark.parametrize("count", [1, 5, 8, 9])
@pytest.mark.parametrize(("strategy", "ranks"), [(FSDP(), 2), (FSDP(), 3), (HSDP(shard=2), 4)])
def test_evaluation_of_any_length_counts_every_sample_once_with_at_most_one_ghost(
    strategy: FSDP, ranks: int, count: int
) -> None:
    (expected,), real_calls, predictions, _ = evaluated(count, "auto")
    results = run_ranks(evaluated, ranks, count, strategy)
    for (metrics,), calls, predicted, sharded in results:
        assert metrics == pytest.approx(expected, rel=1e-6)
        assert calls == -(-real_calls // ranks)
        assert torch.allclose(predicted, predictions, atol=TOLERANCE)
        assert sharded


def validated_first() -> dict[str, Tensor]:
    return trained(strategy="fsdp", val=5, max_epochs=2, val_check_interval=0.5, **CUT)


def test_validation_before_and_inside_training_changes_no_weight() -> None:
    assert_like_one_process(run_ranks(validated_first, 2), one_process(max_epochs=2))


def fits_twice_and_tests() -> Any:
    module = Layered()
    tiny_trainer(strategy="fsdp").fit(module, batches(8, 2))
    trainer = tiny_trainer(strategy="fsdp")
    trainer.fit(module, batches(8, 2))
    return full_weights(module), trainer.test(module, batches(5, 2), verbose=False)


def test_a_sharded_module_can_be_used_by_a_second_trainer() -> None:
    (weights, tested), (same, _) = run_ranks(fits_twice_and_tests, 2)
    assert_same(weights, same)
    module = Layered()
    for _ in range(2):
        tiny_trainer().fit(module, batches(8, 4))
    assert_same(weights, full_weights(module), TOLERANCE)
    assert tested[0]["test_loss"] == pytest.approx(
        tiny_trainer().test(module, batches(5, 2), verbose=False)[0]["test_loss"], rel=1e-5
    )


# --- what is refused ------------------------------------------------------------------------------------------------
class ReturnsNone(Layered):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Empty(Layered):
    def build(self) -> None:
        self.first = nn.ReLU()


class Few(Layered):
    def build(self) -> None:
        self.first = nn.Linear(1, 1, bias=False)


class MakesLBFGS(Layered):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class MakesAdafactor(Layered):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("a batch began")


class SumsGradients(torch.optim.SGD):
    """Made with its state, as torch 2.11's Adagrad is."""

    __module__ = "torch.optim"

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.zeros_like(p)

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"].add_(p.grad)
        return super().step(closure)


class MakesOneWithState(Layered):
    def configure_optimizers(self) -> Any:
        return SumsGradients(self.parameters())


def sums_of_gradients() -> bool:
    module = MakesOneWithState()
    trainer = tiny_trainer(strategy="fsdp", devices="auto", max_steps=1)
    trainer.fit(module, batches(8, 2))
    [optimizer] = trainer.optimizers
    return all(torch.equal(optimizer.state[p]["sum"].full_tensor(), p.grad.full_tensor()) for p in module.parameters())


def test_an_optimizer_of_torch_that_is_made_with_its_state_trains_on_shards() -> None:
    assert run_ranks(sums_of_gradients, 2) == [True, True]


class MakesOneOfAnotherLibrary(Layered):
    def configure_optimizers(self) -> Any:
        return type("Shampoo", (torch.optim.Adafactor,), {"__module__": "others"})(self.parameters())


class Scalar(Layered):
    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.ones(()))


class NoElements(Layered):
    def build(self) -> None:
        super().build()
        self.nothing = nn.Parameter(torch.ones(0, 3))


class ShardedBefore(Layered):
    """Was trained with another precision."""

    def __init__(self) -> None:
        super().__init__()
        tiny_trainer(strategy="fsdp", precision="bf16-mixed").test(self, batches(4, 2), verbose=False)


class GatheredBefore(Layered):
    """Was trained with other options."""

    def __init__(self) -> None:
        super().__init__()
        tiny_trainer(strategy=FSDP(reshard_after_forward=False)).test(self, batches(4, 2), verbose=False)


class MadeTooEarly(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.made


class Fused(Layered):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), fused=True)


def refused(kind: type[Layered], options: dict[str, Any], strategy: str) -> None:
    trained(module=kind(), strategy=strategy_of(strategy, options), **CUT)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            ReturnsNone,
            {},
            "training_step returned None under FSDP, where every rank must go backward. Return `loss * 0`",
        ),
        (Empty, {}, "Empty has no parameters"),
        (Few, {}, "Few has 1 parameter(s), fewer than the 2 ranks"),
        (MakesLBFGS, {}, "LBFGS cannot be used with FSDP"),
        (MakesAdafactor, {}, "Adafactor cannot be used with FSDP: its step does on shards what torch cannot do there"),
        (
            MakesOneOfAnotherLibrary,
            {},
            "Shampoo cannot be used with FSDP: its step does on shards what torch cannot do",
        ),
        (Scalar, {}, "'scale' has no dimension, so FSDP cannot shard it. Make it a parameter of shape (1,)"),
        (NoElements, {}, "'nothing' has no elements, so FSDP cannot shard it"),
        (ShardedBefore, {}, "The module was sharded with precision='bf16-mixed', now it is '32-true'"),
        (
            GatheredBefore,
            {},
            "The module was sharded with reshard_after_forward=False, now it is None. Use False, or a",
        ),
        (MadeTooEarly, {}, "SGD holds parameters that the module no longer has"),
        (Fused, {"cpu_offload": True}, "Use Adam without fused=True"),
        (Layered, {"blocks": [3]}, "blocks holds 3. Name layers by class, class name or path"),
        (Layered, {"blocks": ["Blok"]}, "blocks names 'Blok', but Layered has no such layer. Did you mean 'Block'?"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_the_reason(
    kind: type[Layered], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RanksFailed, match=re.escape(message)):
        run_ranks(refused, 2, kind, options, "fsdp")


@pytest.mark.parametrize(
    ("options", "ranks", "local", "sizes"),
    [
        ({}, 8, 4, (2, 4)),
        ({}, 4, 4, (1, 4)),
        ({"shard": 2}, 8, 4, (4, 2)),
        ({"replicate": 4}, 8, 8, (4, 2)),
        ({"shard": 4, "replicate": 2}, 8, 8, (2, 4)),
        ({"shard": 3}, 8, 4, None),
        ({"replicate": 5}, 8, 4, None),
        ({"shard": 4, "replicate": 4}, 8, 4, None),
    ],
)
def test_the_sizes_of_hsdp_come_from_the_launch_and_must_divide_the_ranks(
    options: dict[str, int], ranks: int, local: int, sizes: tuple[int, int] | None
) -> None:
    strategy = HSDP(**options)
    strategy.world_size, strategy.local_world_size = ranks, local
    if sizes is not None:
        assert strategy.sizes() == sizes
    else:
        with pytest.raises(ValueError, match=rf"cannot divide {ranks} ranks .* Use a shard of 1, 2, 4, 8"):
            strategy.sizes()


def test_one_rank_needs_no_shards() -> None:
    assert_same(trained(strategy=FSDP()), trained())
