"""`trainer.load_weights`: from files of any origin straight into the module, whole or in shards."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import fsspec
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


def test_weights_come_from_a_url_too(tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(write("index", tmp_path).rpartition("/")[0] + "/", "/weights/", recursive=True)
    assert_same(loaded("memory://weights/model.safetensors.index.json", None), source())


def measured_loading(path: str, strategy: str, width: int) -> tuple[int, int]:
    """(bytes read from files, the most bytes of memory that were taken beyond the module's own)."""
    module = Large(path, 2, width)
    tiny_trainer(strategy=strategy).validate(module, [(torch.ones(1, width),)] * 2, verbose=False)
    assert [float(tensor.mean()) for tensor in full_weights(module).values()] == [0.0, 1.0]
    return module.read_bytes, module.taken_bytes


@pytest.mark.parametrize(("strategy", "shares"), [("ddp", [2, 0]), ("fsdp", [1, 1])])
def test_each_byte_is_read_once_and_one_tensor_at_a_time(strategy: str, shares: list[int], tmp_path: Path) -> None:
    """By the rank that holds it, or by rank 0 for all."""
    width = 3072  # 36 MiB a matrix: more than what malloc keeps when it is freed
    tensor_bytes = 4 * width * width
    save_file({f"stack.{i}.weight": torch.full((width, width), float(i)) for i in range(2)}, tmp_path / "w.safetensors")
    found = run_ranks(measured_loading, 2, str(tmp_path / "w.safetensors"), strategy, width)
    assert [read / tensor_bytes for read, _ in found] == pytest.approx(shares, abs=0.1)
    assert max(taken for _, taken in found) < 1.25 * tensor_bytes


class Expecting(pl.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def configure_model(self) -> None:
        self.stream = torch.get_rng_state()
        self.stack = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.trainer.load_weights(self.path)

    def on_validation_start(self) -> None:
        assert torch.equal(torch.get_rng_state(), self.stream), "drawn, though it was loaded"

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("sum", self.stack(batch[0]).sum())


def sum_of_loaded(path: str) -> float:
    data = [(torch.ones(1, 4),)] * 2
    return tiny_trainer(strategy="fsdp").validate(Expecting(path), data, verbose=False)[0]["sum"]


def test_what_will_be_loaded_is_not_drawn_before(tmp_path: Path) -> None:
    shapes = {"weight": (4, 4), "bias": (4,)}
    weights = {f"stack.{i}.{name}": torch.full(shape, 0.5) for i in range(2) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "m.safetensors")
    assert run_ranks(sum_of_loaded, 2, str(tmp_path / "m.safetensors")) == [22.0, 22.0]


class NewHead(Late):
    """A layer that the file lacks, drawn after those that it has."""

    def configure_model(self) -> None:
        super().configure_model()
        self.last = nn.Linear(6, 1)


def test_a_new_head_on_loaded_layers_starts_as_on_one_process(tmp_path: Path) -> None:
    blocks = {n.removeprefix("blocks."): t for n, t in source().items() if n.startswith("blocks.")}
    save_file(blocks, path := tmp_path / "blocks.safetensors")
    for weights in run_ranks(with_new_head, 2, str(path), "fsdp"):
        assert_same(weights, with_new_head(str(path), None))


def with_new_head(path: str, strategy: str | None) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = NewHead(path, prefix="blocks.", strict=False)
    tiny_trainer(strategy=strategy_of(strategy, {})).fit(module, batches(8, 2))
    return full_weights(module)


def test_damaged_bytes_are_an_error_on_every_rank(tmp_path: Path) -> None:
    file = Path(write("ours", tmp_path), "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RanksFailed) as failed:
        run_ranks(loaded, 2, str(file.parent), "ddp")
    assert [error.type_name for error in failed.value.errors.values()] == ["CheckpointError"] * 2


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
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        read, held = of_this_process("io", "rchar"), of_this_process("status", "VmRSS")
        self.trainer.load_weights(self.path)
        self.read_bytes = of_this_process("io", "rchar") - read
        self.taken_bytes = 1024 * (of_this_process("status", "VmHWM") - held)


def of_this_process(file: str, name: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
