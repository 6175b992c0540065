"""Checkpoints on an object store that speaks S3, by its real protocol on loopback."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator

import pytest
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import find_newest, load, remove, resolve_pointer, save, storage, verify, write_pointer

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
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec
    import s3fs

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "k", "secret": "s", "endpoint_url": server})
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
