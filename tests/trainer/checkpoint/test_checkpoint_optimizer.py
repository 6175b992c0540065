"""Optimizer state goes by parameter name: training goes on to the bit, and other parameters are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import (
    load,
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    save,
)

Make = Callable[[Any], optim.Optimizer]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))  # never gets a gradient, so has no state
    return module


def steps(module: nn.Module, optimizer: optim.Optimizer, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = module(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def weights_only(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "weight" in name]


def rest(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "weight" not in name]


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.1),
    "sgd momentum": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "sgd nesterov": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd fused": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam": lambda m: optim.Adam(m.parameters(), lr=0.01),
    "adam amsgrad": lambda m: optim.Adam(m.parameters(), lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "adam fused": lambda m: optim.Adam(m.parameters(), lr=0.01, fused=True),
    "adam foreach": lambda m: optim.Adam(m.parameters(), lr=0.01, foreach=True),
    "adam tensor rate": lambda m: optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=0.01),
    "adamw groups": lambda m: optim.AdamW(
        [{"params": weights_only(m), "lr": 0.02, "note": "w"}, {"params": rest(m), "weight_decay": 0.0}], lr=0.01
    ),
    "adamw named": lambda m: optim.AdamW(m.named_parameters(), lr=0.01),
    "adamax": lambda m: optim.Adamax(m.parameters()),
    "nadam": lambda m: optim.NAdam(m.parameters()),
    "radam": lambda m: optim.RAdam(m.parameters()),
    "adagrad": lambda m: optim.Adagrad(m.parameters()),
    "adadelta": lambda m: optim.Adadelta(m.parameters()),
    "asgd": lambda m: optim.ASGD(m.parameters()),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), momentum=0.9, centered=True),
    "rprop": lambda m: optim.Rprop(m.parameters()),
    "adafactor": lambda m: optim.Adafactor(m.parameters()),
    "lbfgs": lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=4, history_size=3),
    "lbfgs wolfe": lambda m: optim.LBFGS(m.parameters(), line_search_fn="strong_wolfe"),
}


def through_files(tree: Any, path: Path) -> Any:
    return load(save(path / "x", model={}, optimizer=[tree], meta={"global_step": 1, "epoch": 0})).optimizer[0]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_restored_optimizer_goes_on_to_the_bit(make: Make, before: int, tmp_path: Path) -> None:
    straight = network()
    optimizer = make(straight)
    steps(straight, optimizer, before)
    saved_weights = copy.deepcopy(straight.state_dict())
    tree = through_files(optimizer_state_by_name(optimizer, dict(straight.named_parameters())), tmp_path)
    steps(straight, optimizer, 3, start=before)

    resumed = network(seed=1)
    resumed.load_state_dict(saved_weights)
    other = make(resumed)
    if before:
        steps(copy.deepcopy(resumed), other, 0)
    load_optimizer_state_by_name(other, tree, dict(resumed.named_parameters()))
    steps(resumed, other, 3, start=before)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert_same_state(optimizer.state_dict(), other.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resume_on", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "options", [{}, {"fused": True}, {"capturable": True}, {"capturable": True, "lr": torch.tensor(0.01)}], ids=str
)
def test_state_on_a_gpu_goes_on_to_the_bit_and_also_loads_on_the_cpu(
    options: dict[str, Any], resume_on: str, tmp_path: Path
) -> None:
    def make(module: nn.Module, on_gpu: bool) -> optim.Optimizer:
        ours = {k: v.clone().cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        return optim.AdamW(module.parameters(), **(ours if on_gpu else {}))

    def gpu_steps(module: nn.Module, optimizer: optim.Optimizer, device: str) -> None:
        for i in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i)).to(device)
            module(x).square().mean().backward()
            optimizer.step()

    straight = network().cuda()
    optimizer = make(straight, True)
    gpu_steps(straight, optimizer, "cuda")
    names = dict(straight.named_parameters())
    path = save(
        tmp_path / "x",
        model=straight.state_dict(),
        optimizer=optimizer_state_by_name(optimizer, names),
        meta={"global_step": 3, "epoch": 0},
    )
    resumed = network(seed=1).to(resume_on)
    other = make(resumed, resume_on == "cuda")
    loaded = load(path)
    resumed.load_state_dict(loaded.model)
    load_optimizer_state_by_name(other, loaded.optimizer, dict(resumed.named_parameters()))
    gpu_steps(resumed, other, resume_on)
    if resume_on == "cuda":
        gpu_steps(straight, optimizer, "cuda")
        assert_same_state(optimizer.state_dict(), other.state_dict())
        assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


def assert_same_state(a: Any, b: Any) -> None:
    assert type(a) is type(b), (a, b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def test_neither_saving_nor_loading_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    optimizer = optim.Adam(module.parameters())

    def step(*_: Any, **__: Any) -> None:
        raise AssertionError("step() was called")

    monkeypatch.setattr(optimizer, "step", step)
    names = dict(module.named_parameters())
    tree = optimizer_state_by_name(optimizer, names)
    assert tree["state"] == {}
    load_optimizer_state_by_name(optimizer, tree, names)


def test_the_order_of_parameters_may_change_but_not_for_lbfgs() -> None:
    module = network()
    names = dict(module.named_parameters())
    for kind in (optim.Adam, optim.LBFGS):
        saved = kind(module.parameters())
        steps(module, saved, 2)
        tree = optimizer_state_by_name(saved, names)
        other = kind(list(reversed(list(module.parameters()))))
        if kind is optim.LBFGS:
            with pytest.raises(CheckpointError, match="their order"):
                load_optimizer_state_by_name(other, tree, names)
        else:
            load_optimizer_state_by_name(other, tree, names)
            for parameter in module.parameters():
                assert_same_state(dict(saved.state[parameter]), dict(other.state[parameter]))


def test_an_empty_momentum_stays_none(tmp_path: Path) -> None:
    module = network()
    names = dict(module.named_parameters())
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    steps(module, optimizer, 1)
    tree = through_files(optimizer_state_by_name(optimizer, names), tmp_path)
    assert all(state.get("momentum_buffer") is None for state in tree["state"].values())
    load_optimizer_state_by_name(optimizer, tree, names)


def test_state_keeps_its_own_dtype() -> None:
    """As of an optimizer that keeps float32 moments of bfloat16 parameters, or quantised ones."""
    module = network().bfloat16()
    names = dict(module.named_parameters())
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    state = {
        "0.weight": {
            "moment": torch.full((6, 4), 1 + 2**-20),
            "codes": torch.ones(24, dtype=torch.uint8),
            "step": torch.tensor(3.0),
            "nested": {"list": [torch.ones(1, dtype=torch.float64), None], "kind": "text"},
        }
    }
    tree = optimizer_state_by_name(optimizer, names) | {"state": state}
    load_optimizer_state_by_name(optimizer, tree, names)
    assert_same_state(dict(optimizer.state[names["0.weight"]]), state["0.weight"])


def test_how_to_compute_is_the_loading_optimizers_and_what_to_compute_the_saved_ones() -> None:
    module = network()
    names = dict(module.named_parameters())
    saved = optim.Adam(module.parameters(), lr=0.5, betas=(0.1, 0.2), foreach=True)
    saved.param_groups[0]["initial_lr"] = 0.7
    steps(module, saved, 1)
    other = optim.Adam(module.parameters(), lr=0.1, fused=True)
    load_optimizer_state_by_name(other, optimizer_state_by_name(saved, names), names)
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["initial_lr"]) == (0.5, (0.1, 0.2), 0.7)
    assert group["fused"] is True and not group["foreach"]
    steps(module, other, 1)


@pytest.mark.parametrize(("saved", "now"), [(0.5, torch.tensor(0.1)), (torch.tensor(0.5), 0.1)])
def test_a_rate_is_a_tensor_if_the_loading_optimizer_has_it_so(saved: Any, now: Any) -> None:
    module = network()
    names = dict(module.named_parameters())
    tree = optimizer_state_by_name(optim.Adam(module.parameters(), lr=saved, foreach=False), names)
    optimizer = optim.Adam(module.parameters(), lr=now, foreach=False)
    load_optimizer_state_by_name(optimizer, tree, names)
    rate = optimizer.param_groups[0]["lr"]
    assert type(rate) is type(now) and float(rate) == 0.5


def test_the_step_goes_where_the_implementation_wants_it() -> None:
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    names = {"w": parameter}
    state = {"w": {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    for options, device in (({}, "cpu"), ({"capturable": True}, "meta")):
        optimizer = optim.Adam([parameter], **options)  # type: ignore[arg-type]
        tree = optimizer_state_by_name(optimizer, names) | {"state": state}
        load_optimizer_state_by_name(optimizer, tree, names)
        assert optimizer.state[parameter]["step"].device.type == device
        assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


def test_tied_parameters_go_by_their_first_name() -> None:
    module = nn.Module()
    module.first = nn.Linear(3, 3)
    module.second = nn.Linear(3, 3, bias=False)
    module.second.weight = module.first.weight
    names = dict(module.named_parameters(remove_duplicate=False))
    optimizer = optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    assert optimizer_state_by_name(optimizer, names)["groups"][0]["params"] == ["first.weight", "first.bias"]


def renamed(tree: Any, old: str, new: str) -> Any:
    tree = copy.deepcopy(tree)
    for group in tree["groups"]:
        group["params"] = [new if name == old else name for name in group["params"]]
    tree["state"] = {new if name == old else name: value for name, value in tree["state"].items()}
    return tree


def test_other_parameters_or_groups_are_refused_by_name_and_nothing_changes() -> None:
    module = network()
    names = dict(module.named_parameters())
    optimizer = optim.Adam([{"params": weights_only(module)}, {"params": rest(module)}])
    steps(module, optimizer, 2)
    tree = optimizer_state_by_name(optimizer, names)
    one_group = optimizer_state_by_name(optim.Adam(module.parameters()), names)
    moved = copy.deepcopy(tree)
    moved["groups"][1]["params"].append(moved["groups"][0]["params"].pop())
    fewer = copy.deepcopy(tree)
    fewer["groups"][1]["params"].remove("unused")
    stray = copy.deepcopy(tree)
    stray["state"]["stray"] = {}
    before = copy.deepcopy(optimizer.state_dict())
    for wrong, reason in (
        (renamed(tree, "0.weight", "encoder.weight"), "'encoder.weight' was saved in group 0 of Adam and is in none"),
        (moved, "'2.weight' was saved in group 1 of Adam and is now in group 0"),
        (fewer, "'unused' is in group 1 of Adam, but was not when"),
        (one_group, "has 2 parameter groups and was saved with 1"),
        (stray, "'stray'"),
        ({"state": {}}, "not what a save writes"),
        (tree | {"groups": None}, "not what a save writes"),
        (tree | {"state": None}, "not what a save writes"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_optimizer_state_by_name(optimizer, wrong, names)
        assert_same_state(optimizer.state_dict(), before)


def test_another_kind_of_optimizer_is_refused_unless_it_knows_all_options() -> None:
    module = network()
    names = dict(module.named_parameters())
    adam, adamw = optim.Adam(module.parameters()), optim.AdamW(module.parameters())
    steps(module, adam, 1)
    tree = optimizer_state_by_name(adam, names)
    load_optimizer_state_by_name(adamw, tree, names)
    with pytest.raises(CheckpointError, match="saved by Adam and the optimizer is now SGD"):
        load_optimizer_state_by_name(optim.SGD(module.parameters(), lr=0.1), tree, names)


def test_a_parameter_that_is_not_the_modules_is_refused() -> None:
    module = network()
    optimizer = optim.Adam([*module.parameters(), nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(CheckpointError, match=r"parameter 5 of group 0 of Adam, of shape \[2, 3\], is no parameter"):
        optimizer_state_by_name(optimizer, dict(module.named_parameters()))


def test_state_under_a_text_key_is_kept(tmp_path: Path) -> None:
    module = network()
    names = dict(module.named_parameters())
    optimizer = optim.Adam(module.parameters())
    optimizer.state["shared"] = {"k": 3}  # type: ignore[index]
    tree = through_files(optimizer_state_by_name(optimizer, names), tmp_path)
    other = optim.Adam(module.parameters())
    load_optimizer_state_by_name(other, tree, names)
    assert other.state["shared"] == {"k": 3}  # type: ignore[index]


def test_the_hooks_of_the_optimizer_run() -> None:
    module = network()
    names = dict(module.named_parameters())
    optimizer = optim.Adam(module.parameters())
    seen: list[str] = []
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saved"))
    load_optimizer_state_by_name(optimizer, optimizer_state_by_name(optimizer, names), names)
    assert seen == ["saved", "loaded"]


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: optim.lr_scheduler.StepLR(o, 2),
    "multi step": lambda o: optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "cosine": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "restarts": lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "one cycle": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
    "cyclic": lambda o: optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "plateau": lambda o: optim.lr_scheduler.ReduceLROnPlateau(o),
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "polynomial": lambda o: optim.lr_scheduler.PolynomialLR(o),
    "sequential": lambda o: optim.lr_scheduler.SequentialLR(
        o, [optim.lr_scheduler.LinearLR(o), optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_the_state_of_every_scheduler_can_be_stored_and_goes_on(
    make: Callable[[optim.Optimizer], Any], tmp_path: Path
) -> None:
    def rates(scheduler: Any, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            scheduler.optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau) else []))
            seen.append(scheduler.optimizer.param_groups[0]["lr"])
        return seen

    def new() -> Any:
        return make(optim.SGD(network().parameters(), lr=0.1, momentum=0.9))

    first = new()
    rates(first, 3)
    tree = {"optimizer": first.optimizer.state_dict()["param_groups"], "scheduler": first.state_dict()}
    path = save(tmp_path / "x", model={}, state=tree, meta={"global_step": 1, "epoch": 0})
    expected = rates(first, 6)
    second = new()
    second.load_state_dict(load(path).state["scheduler"])
    second.optimizer.param_groups[0].update(
        {k: v for k, v in load(path).state["optimizer"][0].items() if k != "params"}
    )
    assert rates(second, 6) == expected
