"""What every strategy promises: each public method of `Strategy` runs in real ranks, for every strategy.

Each exercise below is one method. `exercise_all` runs them all in the ranks of one job and returns what came of them;
the tests look at one method each. A method without an exercise, or a strategy that is not listed, fails a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from paceline.errors import ConfigurationError
from paceline.strategies import FSDP, ddp, single  # noqa: F401  registers them
from paceline.strategies.base import STRATEGIES, Strategy
from paceline.strategies.cluster import find_cluster
from paceline.strategies.precision import PRECISIONS, parse_precision
from paceline.trainer.prefetch import move

from helpers.ranks import run_ranks

CASES = [("single", 1), *(("ddp", ranks) for ranks in (1, 2, 3, 4)), ("ddp_find_unused_parameters_true", 2)]
EXERCISES: dict[str, Callable[[Strategy], Any]] = {}


def exercise(function: Callable[[Strategy], Any]) -> Callable[[Strategy], Any]:
    """Run in every rank under the name of the method that it exercises."""
    EXERCISES[function.__name__.removeprefix("exercise_")] = function
    return function


def exercise_all(name: str) -> dict[str, Any]:
    strategy = new_strategy(name)
    found = {}
    for method, run in EXERCISES.items():
        dist.barrier() if dist.is_initialized() else None
        found[method] = run(strategy)
    return found


def new_strategy(name: str) -> Strategy:
    strategy, cluster = STRATEGIES[name](), find_cluster()
    strategy.take_place(torch.device("cpu"), cluster)
    strategy.connect(cluster)
    return strategy


@contextmanager
def placed(strategy: Strategy, precision: str = "32-true", wrapped: bool = True) -> Iterator[nn.Linear]:
    """A module with weights 1 and 2 in the hands of the strategy."""
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    strategy.place(module, parse_precision(precision))
    if wrapped:
        strategy.wrap()
    yield module
    strategy.unwrap()


def inputs_of(rank: int) -> Tensor:
    """The gradient of `module(inputs).sum()`."""
    return torch.tensor([[1.0 + rank, 10.0]])


def mean_gradient(ranks: int) -> list[float]:
    return torch.stack([inputs_of(rank)[0] for rank in range(ranks)]).mean(0).tolist()


def grad(module: nn.Linear) -> list[float]:
    assert module.weight.grad is not None
    return module.weight.grad[0].tolist()


def backward(strategy: Strategy, module: nn.Linear, synced: bool = True) -> None:
    step = strategy.training_step(lambda batch: module(batch).sum())
    strategy.sync_gradients(synced)
    step(inputs_of(strategy.rank)).backward()


# --- the exercises --------------------------------------------------------------------------------------------------
@exercise
def exercise_take_place(strategy: Strategy) -> Any:
    return strategy.rank, strategy.world_size, strategy.local_rank, strategy.local_world_size, strategy.node_rank


@exercise
def exercise_connect(strategy: Strategy) -> Any:
    return dist.is_initialized(), strategy.world_size


@exercise
def exercise_name(strategy: Strategy) -> Any:
    return strategy.name


@exercise
def exercise_data_rank(strategy: Strategy) -> Any:
    return strategy.data_rank


@exercise
def exercise_data_ranks(strategy: Strategy) -> Any:
    return strategy.data_ranks


@exercise
def exercise_gradient_divisor(strategy: Strategy) -> Any:
    return strategy.gradient_divisor


@exercise
def exercise_is_global_zero(strategy: Strategy) -> Any:
    return strategy.is_global_zero


@exercise
def exercise_global_rank(strategy: Strategy) -> Any:
    return strategy.global_rank


@exercise
def exercise_root_device(strategy: Strategy) -> Any:
    return str(strategy.root_device)


@exercise
def exercise_reduce(strategy: Strategy) -> Any:
    """Each reduction by Lightning's name, and whether the tensor given to it is as it was."""
    tensor = torch.tensor([1.0 + strategy.rank])
    reduced = {op: strategy.reduce(tensor, reduce_op=op).item() for op in ("sum", "mean", "avg", "max", None)}
    return reduced, tensor.item() == 1.0 + strategy.rank


@exercise
def exercise_building(strategy: Strategy) -> Any:
    with strategy.building():
        return nn.Linear(2, 1).weight.device.type


@exercise
def exercise_place(strategy: Strategy) -> Any:
    found = {}
    for precision in PRECISIONS:
        with placed(strategy, precision, wrapped=False) as module:
            assert strategy.module is module
            found[precision] = str(module.weight.dtype), strategy.scaler is not None, str(strategy.device)
    return found


@exercise
def exercise_wrap(strategy: Strategy) -> Any:
    """Rank 0's weights reach all ranks, no gradient is left, and wrapping again changes nothing."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.constant_(module.weight, 5.0 + strategy.rank)
    strategy.place(module, parse_precision("32-true"))
    strategy.wrap()
    strategy.wrap()
    found = module.weight[0].tolist(), module.weight.grad
    strategy.unwrap()
    return found


@exercise
def exercise_training_step(strategy: Strategy) -> Any:
    with placed(strategy) as module:
        backward(strategy, module)
        backward(strategy, module)
        return grad(module)


@exercise
def exercise_evaluation_step(strategy: Strategy) -> Any:
    """Rank 0 evaluates alone: for these strategies nobody else has to."""
    with placed(strategy) as module, torch.no_grad():
        step = strategy.evaluation_step(lambda batch: module(batch).sum())
        return float(step(inputs_of(0))) if strategy.rank == 0 or strategy.evaluation_communicates else 21.0


@exercise
def exercise_batch_to_device(strategy: Strategy) -> Any:
    found = []
    for precision in ("32-true", "bf16-true"):
        with placed(strategy, precision, wrapped=False):
            batch = strategy.batch_to_device({"x": torch.ones(1), "ids": torch.ones(1, dtype=torch.long)}, move)
            found.append((str(batch["x"].dtype), str(batch["ids"].dtype), str(batch["x"].device)))
    return found


@exercise
def exercise_sync_gradients(strategy: Strategy) -> Any:
    """Gradients of two backward passes: local after the first, and reduced with it after the second."""
    with placed(strategy) as module:
        backward(strategy, module, synced=False)
        local = grad(module)
        backward(strategy, module)
        return local, grad(module)


@exercise
def exercise_idle_backward(strategy: Strategy) -> Any:
    """Rank 0 has no loss: its share is zero, and nobody waits."""
    with placed(strategy) as module:
        step = strategy.training_step(lambda batch: None if strategy.rank == 0 else module(batch).sum())
        strategy.sync_gradients(True)
        loss = step(inputs_of(strategy.rank))
        if loss is None:
            strategy.idle_backward()
        else:
            loss.backward()
        return grad(module)


@exercise
def exercise_drop_window(strategy: Strategy) -> Any:
    """A window is given up after its first micro-batch; the next one is as if it had never been."""
    with placed(strategy) as module:
        backward(strategy, module, synced=False)
        strategy.drop_window()
        module.zero_grad()
        step = strategy.training_step(lambda batch: module(batch).sum())
        step(inputs_of(strategy.rank)).backward()
        return grad(module)


@exercise
def exercise_sync_buffers(strategy: Strategy) -> Any:
    module = nn.BatchNorm1d(2)
    strategy.place(module, parse_precision("32-true"))
    strategy.wrap()
    module.running_mean.fill_(3.0 + strategy.rank)
    strategy.sync_buffers()
    strategy.unwrap()
    return module.running_mean.tolist()


@exercise
def exercise_trainable_changed(strategy: Strategy) -> Any:
    return strategy.trainable_changed()


@exercise
def exercise_average_gradients(strategy: Strategy) -> Any:
    """Also where a rank has no gradient; a second time changes nothing."""
    module = nn.Linear(2, 1)
    strategy.place(module, parse_precision("32-true"))
    module(inputs_of(strategy.rank)).sum().backward()
    if strategy.rank:
        module.bias.grad = None
    strategy.average_gradients(module.parameters())
    strategy.average_gradients(module.parameters())
    assert module.bias.grad is not None
    return grad(module), module.bias.grad.item()


@exercise
def exercise_check_optimizer(strategy: Strategy) -> Any:
    with placed(strategy, wrapped=False) as module:
        return strategy.check_optimizer(torch.optim.SGD(module.parameters(), lr=1.0))


@exercise
def exercise_scale(strategy: Strategy) -> Any:
    found = []
    for precision in ("32-true", "16-mixed"):
        with placed(strategy, precision, wrapped=False):
            found.append(float(strategy.scale(torch.tensor(1.0))))
    return found


@exercise
def exercise_unscale_gradients(strategy: Strategy) -> Any:
    with placed(strategy, "16-mixed", wrapped=False) as module:
        strategy.scale((module.weight * inputs_of(strategy.rank)).sum()).backward()
        strategy.unscale_gradients(torch.optim.SGD(module.parameters(), lr=1.0))
        return grad(module)


@exercise
def exercise_clip_gradients(strategy: Strategy) -> Any:
    with placed(strategy, wrapped=False) as module:
        found = []
        for algorithm in ("norm", "value"):
            module.weight.grad = torch.tensor([[3.0, 4.0]])
            norm = strategy.clip_gradients([module.weight], 1.0, algorithm)
            found.append((None if norm is None else float(norm), [round(value, 5) for value in grad(module)]))
        return found


@exercise
def exercise_optimizer_step(strategy: Strategy) -> Any:
    """(stepped, weights): plainly; with a closure; under 16-mixed; and where a gradient overflowed there."""
    found = []
    for precision, gradient, closure in (
        ("32-true", 1.0, None),
        ("32-true", 1.0, lambda: None),
        ("16-mixed", 1.0, None),
        ("16-mixed", float("inf"), None),
    ):
        with placed(strategy, precision, wrapped=False) as module:
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            strategy.scale((module.weight * gradient).sum()).backward()
            strategy.unscale_gradients(optimizer)
            found.append((strategy.optimizer_step(optimizer, closure), module.weight[0].tolist()))
    return found


@exercise
def exercise_named_state(strategy: Strategy) -> Any:
    module = nn.BatchNorm1d(2)
    strategy.place(module, parse_precision("32-true"))
    strategy.wrap()
    state = dict(strategy.named_state())
    strategy.unwrap()
    return list(state), state["weight"] is module.weight


@exercise
def exercise_channel(strategy: Strategy) -> Any:
    """Messages of two channels, read in another order than they were sent."""
    first, second = strategy.channel("first"), strategy.channel("second")
    assert strategy.channel("first") is first
    messages = [channel.gather(torch.tensor([strategy.rank + offset, 7.0], dtype=torch.float64))
                for channel, offset in ((first, 0.0), (second, 100.0), (first, 200.0))]  # fmt: skip
    rows = [messages[index].wait().tolist() for index in (2, 1, 0)]
    assert all(message.arrived() for message in messages)
    return rows


@exercise
def exercise_barrier(strategy: Strategy) -> Any:
    return strategy.barrier()


@exercise
def exercise_broadcast(strategy: Strategy) -> Any:
    src = strategy.world_size - 1
    tensor = torch.tensor([float(strategy.rank)])
    assert strategy.broadcast(tensor, src) is tensor
    return tensor.item()


@exercise
def exercise_all_reduce(strategy: Strategy) -> Any:
    return {
        op: strategy.all_reduce(torch.tensor([1.0 + strategy.rank]), op).item() for op in ("sum", "mean", "min", "max")
    }


@exercise
def exercise_all_gather(strategy: Strategy) -> Any:
    """Plainly, of a scalar, and with gradients: each rank's own row is multiplied by 3 on every rank."""
    own = torch.full((2, 2), float(strategy.rank), requires_grad=True)
    gathered = strategy.all_gather(own)
    scalar = strategy.all_gather(torch.tensor(strategy.rank))
    with_graph = strategy.all_gather(own, sync_grads=True)
    (with_graph * 3).sum().backward()
    assert own.grad is not None
    return gathered.shape, gathered.reshape(-1, 4)[:, 0].tolist(), scalar.reshape(-1).tolist(), own.grad[0, 0].item()


@exercise
def exercise_broadcast_object(strategy: Strategy) -> Any:
    return strategy.broadcast_object({"rank": strategy.rank}, src=strategy.world_size - 1)


@exercise
def exercise_from_rank_zero(strategy: Strategy) -> Any:
    """What only rank 0 does, or fails to do, is known to all."""

    def fail(kind: type[Exception]) -> None:
        raise kind(f"rank {strategy.rank}")

    told = []
    for kind in (ConfigurationError, OSError):  # such as an argument, and a disk
        try:
            strategy.from_rank_zero(partial(fail, kind))
        except kind as error:
            told.append(str(error))
    return strategy.from_rank_zero(lambda: f"{strategy.rank} did it"), *told


@exercise
def exercise_all_gather_object(strategy: Strategy) -> Any:
    return strategy.all_gather_object(("rank", strategy.rank))


@exercise
def exercise_unwrap(strategy: Strategy) -> Any:
    """The module trains on by itself afterwards, and can be wrapped again."""
    with placed(strategy) as module:
        pass
    module(inputs_of(strategy.rank)).sum().backward()
    alone = grad(module)
    module.weight.grad = None
    strategy.wrap()
    backward(strategy, module)
    strategy.unwrap()
    return alone, grad(module)


@exercise
def exercise_disconnect(strategy: Strategy) -> Any:
    strategy.disconnect()
    return dist.is_initialized()


# --- what must come of them -----------------------------------------------------------------------------------------
@cache
def results(name: str, ranks: int) -> list[dict[str, Any]]:
    """What the exercises returned, for each rank."""
    return list(run_ranks(exercise_all, ranks, name))


every_case = pytest.mark.parametrize(("name", "ranks"), CASES, ids=[f"{name}-{ranks}" for name, ranks in CASES])


def expect(method: str, name: str, ranks: int, expected: Callable[[int], Any]) -> None:
    assert [rank[method] for rank in results(name, ranks)] == [expected(rank) for rank in range(ranks)]


def test_every_public_method_has_an_exercise() -> None:
    public = {name for kind in Strategy.__mro__[:-1] for name, value in vars(kind).items()
              if not name.startswith("_") and (callable(value) or isinstance(value, property))}  # fmt: skip
    assert public == set(EXERCISES)


def test_every_strategy_that_keeps_parameters_whole_is_exercised() -> None:
    made = {name: make() for name, make in STRATEGIES.items()}
    ours = {name for name, it in made.items() if type(it).__module__.startswith("paceline.")}
    ours -= {name for name, it in made.items() if isinstance(it, FSDP)}  # `test_fsdp.py` has its own
    assert ours == {name for name, _ in CASES}


@every_case
def test_a_strategy_knows_its_place(name: str, ranks: int) -> None:
    expect("take_place", name, ranks, lambda rank: (rank, ranks, rank, ranks, 0))
    expect("global_rank", name, ranks, lambda rank: rank)
    expect("is_global_zero", name, ranks, lambda rank: rank == 0)
    expect("data_rank", name, ranks, lambda rank: rank)
    expect("data_ranks", name, ranks, lambda rank: ranks)
    expect("connect", name, ranks, lambda rank: (ranks > 1, ranks))
    expect("gradient_divisor", name, ranks, lambda rank: ranks)
    expect("disconnect", name, ranks, lambda rank: False)
    expect("name", name, ranks, lambda rank: "SingleDevice" if name == "single" else "DDP")


@every_case
def test_parameters_have_the_type_of_the_precision(name: str, ranks: int) -> None:
    types = {"32-true": "float32", "bf16-mixed": "float32", "16-mixed": "float32", "bf16-true": "bfloat16",
             "16-true": "float16", "64-true": "float64"}  # fmt: skip
    expected = {key: (f"torch.{dtype}", key == "16-mixed", "cpu") for key, dtype in types.items()}
    expect("place", name, ranks, lambda rank: expected)
    expect("building", name, ranks, lambda rank: "cpu")
    expect("root_device", name, ranks, lambda rank: "cpu")
    expect("check_optimizer", name, ranks, lambda rank: None)


@every_case
def test_all_ranks_start_from_the_weights_of_rank_0_without_gradients(name: str, ranks: int) -> None:
    expect("wrap", name, ranks, lambda rank: ([5.0, 5.0], None))


@every_case
def test_all_ranks_get_the_buffers_of_rank_0(name: str, ranks: int) -> None:
    expect("sync_buffers", name, ranks, lambda rank: [3.0, 3.0])


@every_case
def test_gradients_are_averages_over_the_ranks_at_the_end_of_a_window(name: str, ranks: int) -> None:
    mean = torch.tensor(mean_gradient(ranks))
    expect("training_step", name, ranks, lambda rank: (2 * mean).tolist())
    expect("sync_gradients", name, ranks, lambda rank: (inputs_of(rank)[0].tolist(), (2 * mean).tolist()))
    expect("drop_window", name, ranks, lambda rank: mean.tolist())
    expect("unwrap", name, ranks, lambda rank: (inputs_of(rank)[0].tolist(), mean.tolist()))


@every_case
def test_a_rank_without_a_loss_counts_as_zero(name: str, ranks: int) -> None:
    expected = torch.tensor(mean_gradient(ranks)) - inputs_of(0)[0] / ranks
    for rank in results(name, ranks):
        assert rank["idle_backward"] == pytest.approx(expected.tolist())


@every_case
def test_averaging_by_hand_gives_the_mean_and_repeating_it_is_harmless(name: str, ranks: int) -> None:
    for gradient, bias in (rank["average_gradients"] for rank in results(name, ranks)):
        assert gradient == pytest.approx(mean_gradient(ranks))
        assert bias == pytest.approx(1 / ranks)


@every_case
def test_evaluation_needs_no_other_rank(name: str, ranks: int) -> None:
    expect("evaluation_step", name, ranks, lambda rank: 21.0)


@every_case
def test_a_batch_is_moved_and_its_floats_get_the_weights_type(name: str, ranks: int) -> None:
    expected = [("torch.float32", "torch.int64", "cpu"), ("torch.bfloat16", "torch.int64", "cpu")]
    expect("batch_to_device", name, ranks, lambda rank: expected)


@every_case
def test_the_loss_is_scaled_and_gradients_unscaled_under_16_mixed_alone(name: str, ranks: int) -> None:
    expect("scale", name, ranks, lambda rank: [1.0, 65536.0])
    expect("unscale_gradients", name, ranks, lambda rank: inputs_of(rank)[0].tolist())


@every_case
def test_clipping_returns_the_norm_before_it(name: str, ranks: int) -> None:
    expect("clip_gradients", name, ranks, lambda rank: [(5.0, [0.6, 0.8]), (None, [1.0, 1.0])])


@every_case
def test_an_optimizer_step_tells_whether_it_was_taken(name: str, ranks: int) -> None:
    stepped, skipped = (True, [0.0, 1.0]), (False, [1.0, 2.0])
    expect("optimizer_step", name, ranks, lambda rank: [stepped, stepped, stepped, skipped])


@every_case
def test_state_is_named_as_the_users_module_names_it(name: str, ranks: int) -> None:
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expect("named_state", name, ranks, lambda rank: (names, True))


@every_case
def test_channels_do_not_disturb_each_other(name: str, ranks: int) -> None:
    rows = [[[rank + offset, 7.0] for rank in range(ranks)] for offset in (200.0, 100.0, 0.0)]
    expect("channel", name, ranks, lambda rank: rows)


@every_case
def test_collectives_give_every_rank_the_same(name: str, ranks: int) -> None:
    numbers = [1.0 + rank for rank in range(ranks)]
    reduced = {"sum": sum(numbers), "mean": sum(numbers) / ranks, "min": 1.0, "max": float(ranks)}
    expect("all_reduce", name, ranks, lambda rank: reduced)
    renamed = {"sum": "sum", "mean": "mean", "avg": "mean", "max": "max", None: "sum"}
    expect("reduce", name, ranks, lambda rank: ({op: reduced[ours] for op, ours in renamed.items()}, True))
    expect("barrier", name, ranks, lambda rank: None)
    expect("broadcast", name, ranks, lambda rank: ranks - 1)
    expect("broadcast_object", name, ranks, lambda rank: {"rank": ranks - 1})
    expect("from_rank_zero", name, ranks, lambda rank: ("0 did it", "rank 0", "rank 0"))
    expect("all_gather_object", name, ranks, lambda rank: [("rank", other) for other in range(ranks)])


@every_case
def test_all_gather_stacks_the_ranks_and_sums_their_gradients(name: str, ranks: int) -> None:
    shape = (ranks, 2, 2) if ranks > 1 else (2, 2)
    rows = [float(rank) for rank in range(ranks)]
    expect("all_gather", name, ranks, lambda rank: (shape, rows, list(range(ranks)), 3.0 * ranks))
