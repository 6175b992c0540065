"""Checkpoints on an object store that speaks S3, by its real protocol on loopback."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import find_newest, load, remove, resolve_pointer, save, storage, verify, write_pointer

from helpers.cutting_proxy import CuttingProxy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    running.start()
    yield f"http://127.0.0.1:{port}"
    running.stop()


@pytest.fixture
def proxy(server: str) -> Iterator[CuttingProxy]:
    with CuttingProxy(int(server.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def bucket(proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec
    import s3fs

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    settings = {"key": "k", "secret": "s", "endpoint_url": proxy.url}
    settings["config_kwargs"] = {"retries": {"max_attempts": 1}}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # its own and botocore's: half a minute otherwise
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"s3://b{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    yield name
    s3fs.S3FileSystem.clear_instance_cache()


def save_step(folder: str, step: int, count: int = 1000) -> str:
    value = torch.full((count,), float(step))
    return save(f"{folder}/step={step}.ckpt", model={"w": value}, meta={"global_step": step, "epoch": 0})


def test_checkpoints_are_saved_found_loaded_and_removed(bucket: str) -> None:
    folder = f"{bucket}/runs/checkpoints"
    assert find_newest([folder]) == (None, [])
    first, second = save_step(folder, 1), save_step(folder, 2, count=3_000_000)
    assert find_newest([folder]) == (second, []) and verify(second) == []
    assert torch.equal(load(first).model["w"], torch.ones(1000))
    assert save_step(folder, 1) == first.replace(".ckpt", "-v1.ckpt")
    write_pointer(f"{folder}/last.ckpt", first)
    assert resolve_pointer(f"{folder}/last.ckpt") == first
    remove(second)
    assert find_newest([folder])[0] != second and load(first).meta["global_step"] == 1


def test_a_save_that_fails_at_any_request_leaves_the_older_checkpoint(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_step(bucket, 1)
    failures = 0
    for n in range(1, 40):
        seen = 0

        def changing(kind: str, path: str, n: int = n) -> None:
            nonlocal seen
            seen += 1
            if seen == n:
                raise ConnectionResetError(104, os.strerror(104), path)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "changing", changing)
            try:
                save_step(bucket, 2)
            except CheckpointError as error:
                assert "Connection reset" in str(error)
                failures += 1
        if seen < n:
            break
        assert find_newest([bucket])[0] == first and verify(first) == []
    assert failures >= 4


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_connection_cut_once_costs_nothing_wherever_it_is_cut(
    bucket: str, proxy: CuttingProxy, direction: Any
) -> None:
    cuts = 0
    for step, after in enumerate(range(100, 20_000, 900), 1):
        proxy.cut(direction, after, times=1)
        saved = save_step(bucket, step)
        found, _ = find_newest([bucket])
        weight = load(saved).model["w"]
        cuts += proxy.stop()
        assert found == saved and torch.equal(weight, torch.full((1000,), float(step)))
    assert cuts > 12


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_network_that_stays_broken_is_told_and_leaves_the_older_checkpoint(
    bucket: str, proxy: CuttingProxy, direction: Any
) -> None:
    first = save_step(bucket, 1)
    for after in (1, 2000, 5000):
        for work in (lambda: save_step(bucket, 2), lambda: load(first).model, lambda: find_newest([bucket])):
            proxy.cut(direction, after, times=10**6)
            try:
                work()
            except CheckpointError as error:
                assert bucket in str(error) and "Error" in str(error)
            else:
                assert after > 1
            finally:
                proxy.stop()
        newest = find_newest([bucket])[0]
        assert newest is not None and verify(newest) == []
    assert verify(first) == []


def test_what_is_missing_from_lists_for_a_while_is_found_all_the_same(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    folder = f"{bucket}/checkpoints"
    first = save_step(folder, 1)
    write_pointer(f"{folder}/last.ckpt", first)
    second = save_step(folder, 2)
    write_pointer(f"{folder}/last.ckpt", second)
    hidden = "step=2.ckpt"
    listed = s3fs.S3FileSystem._lsdir

    async def lagging(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        entries = await listed(self, path, *args, **kwargs)
        return [entry for entry in entries if hidden not in entry["name"]]

    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", lagging)
    assert find_newest([folder]) == (second, [])
    assert torch.equal(load(second).model["w"], torch.full((1000,), 2.0))
    assert save_step(folder, 2) == second.replace(".ckpt", "-v1.ckpt")
    assert verify(second) == []
    hidden = "model.safetensors"
    assert find_newest([folder]) == (second.replace(".ckpt", "-v1.ckpt"), [])
    remove(first)
    hidden = "nothing"
    assert find_newest([folder])[0] == second.replace(".ckpt", "-v1.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(first)
