"""`trainer.load_weights`: from files of any origin straight into the module, whole or in shards."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import paceline as pl
from paceline.errors import CheckpointError

from helpers.ranks import RanksFailed, run_ranks
from helpers.sharded import Layered, batches, full_weights, strategy_of
from helpers.tiny import assert_same, tiny_trainer


class Late(Layered):
    """Loads the weights where users do: in `configure_model`."""

    def __init__(self, path: str, **arguments: Any) -> None:
        super().__init__(late=True, tied=True)
        self.path, self.arguments = path, arguments

    def configure_model(self) -> None:
        super().configure_model()
        self.trainer.load_weights(self.path, **self.arguments)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def source(seed: int = 99) -> dict[str, Tensor]:
    """Weights that no constructor draws; tied ones under one name, as in files of safetensors."""
    generator = torch.Generator().manual_seed(seed)
    model = Layered(tied=True)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def write(kind: str, folder: Path) -> str:
    weights = source()
    if kind == "file":
        save_file(weights, folder / "weights.safetensors")
        return str(folder / "weights.safetensors")
    if kind == "half":
        save_file({name: tensor.half() for name, tensor in weights.items()}, folder / "weights.safetensors")
        return str(folder / "weights.safetensors")
    if kind in ("index", "folder"):
        names = sorted(weights)
        parts = {"model-1-of-2.safetensors": names[:5], "model-2-of-2.safetensors": names[5:]}
        for file, held in parts.items():
            save_file({name: weights[name] for name in held}, folder / file)
        places = {name: file for file, held in parts.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return str(folder if kind == "folder" else folder / "model.safetensors.index.json")
    module = Layered(tied=True)
    trainer = tiny_trainer(max_steps=0)
    trainer.fit(module, batches(8, 2))
    module.load_state_dict(weights, strict=False)
    return trainer.save_checkpoint(str(folder / "ours.ckpt"), weights_only=True)


def loaded(path: str, strategy: str | None, **arguments: Any) -> dict[str, Tensor]:
    module = Late(path, **arguments)
    tiny_trainer(strategy=strategy_of(strategy, {})).fit(module, batches(8, 2))
    return full_weights(module)


@pytest.mark.parametrize("kind", ["file", "index", "folder", "ours"])
@pytest.mark.parametrize(("strategy", "ranks"), [(None, 1), ("ddp", 2), ("fsdp", 3), ("hsdp", 2)])
def test_weights_of_any_origin_arrive_under_any_strategy(
    strategy: str | None, ranks: int, kind: str, tmp_path: Path
) -> None:
    path = write(kind, tmp_path)
    results = [loaded(path, None)] if ranks == 1 else run_ranks(loaded, ranks, path, strategy)
    for weights in results:
        assert_same(weights, source())


def test_other_types_of_numbers_are_converted(tmp_path: Path) -> None:
    assert_same(loaded(write("half", tmp_path), None), {n: t.half().float() for n, t in source().items()})


def test_a_part_of_the_module_can_be_loaded_at_any_time(tmp_path: Path) -> None:
    block = {name.removeprefix("blocks.1."): t for name, t in source().items() if name.startswith("blocks.1.")}
    save_file(block, tmp_path / "block.safetensors")
    module, trainer = Layered(tied=True), tiny_trainer(max_steps=0)
    before = full_weights(module)
    trainer.fit(module, batches(8, 2))
    trainer.load_weights(tmp_path / "block.safetensors", prefix="blocks.1.")
    assert_same(full_weights(module), before | {f"blocks.1.{name}": tensor for name, tensor in block.items()})


class Wider(Late):
    def build(self) -> None:
        super().build()
        self.head = nn.Linear(3, 3)


def fit_wider(path: str, strict: bool) -> None:
    tiny_trainer().fit(Wider(path, strict=strict), batches(8, 2))


def test_names_on_one_side_only_are_an_error_or_a_warning(tmp_path: Path) -> None:
    path = write("file", tmp_path)
    with pytest.raises(CheckpointError, match=r"it lacks 'head.bias', 'head.weight' of the module.*strict=False"):
        fit_wider(path, strict=True)
    with pytest.warns(UserWarning, match="it lacks 'head.bias'"):
        fit_wider(path, strict=False)
    with pytest.raises(CheckpointError, match=r"no name of both is alike under prefix='x\."):
        loaded(path, None, prefix="x.", strict=False)


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    save_file(source() | {"last.weight": torch.zeros(2, 6)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"'last.weight' with the shape \[2, 6\], the module has \[1, 6\]"):
        loaded(str(tmp_path / "weights.safetensors"), None)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "evil.bin", 3])
def test_an_index_cannot_lead_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"first.weight": name}}))
    with pytest.raises(CheckpointError, match=r"which is no \.safetensors file beside it"):
        loaded(str(tmp_path), None)


def test_what_is_not_there_is_an_error_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="does not exist"):
        run_ranks(loaded, 2, str(tmp_path / "nothing"), "fsdp")


class Large(pl.Module):
    """`layers` matrices of `width` by `width` numbers, each the largest tensor there is."""

    def __init__(self, path: str, layers: int, width: int) -> None:
        super().__init__()
        self.path, self.layers, self.width = path, layers, width

    def configure_model(self) -> None:
        if not hasattr(self, "stack"):
            self.stack = nn.Sequential(*(nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self.stack(batch[0]).mean())

    def on_validation_start(self) -> None:
        self.trainer.load_weights(self.path)
        self.share = sum(p.to_local().numel() * 4 for p in self.parameters())


def memory_of_loading(path: str, layers: int, width: int) -> tuple[int, int]:
    """(the most bytes that this process took beyond what it began with and its shards, bytes of the shards)."""
    began = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    module = Large(path, layers, width)
    tiny_trainer(strategy="fsdp").validate(module, [(torch.ones(1, width),)] * 4, verbose=False)
    assert torch.equal(module.stack[layers - 1].weight.to_local()[0], torch.full((width,), float(layers - 1))), (
        "not the values of the file"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - began - module.share, module.share


@pytest.mark.slow
def test_two_gigabytes_on_four_ranks_take_no_more_than_one_tensor_of_extra_memory(tmp_path: Path) -> None:
    layers, width = 32, 4096  # 64 MiB a matrix, 2 GiB in all
    for start in range(0, layers, 4):
        part = {f"stack.{i}.weight": torch.full((width, width), float(i)) for i in range(start, start + 4)}
        save_file(part, tmp_path / f"model-{start}.safetensors")
    places = {f"stack.{i}.weight": f"model-{i // 4 * 4}.safetensors" for i in range(layers)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for extra, share in run_ranks(memory_of_loading, 4, str(tmp_path), layers, width, timeout_seconds=170):
        assert share == layers * width * width
        print(f"{extra / 2**20:.0f} MiB beyond shards of {share / 2**20:.0f} MiB")
        assert extra < 6 * width * width * 4  # two layers gathered in the forward pass, one tensor being read or drawn
