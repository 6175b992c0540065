"""A save that fails or is killed at any of its writes costs nothing that was saved before."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from paceline.errors import CheckpointError
from paceline.trainer.checkpoint import find_newest, load, remove, resolve_pointer, save, storage, verify, write_pointer
from paceline.trainer.checkpoint.storage import storage_of
from paceline.trainer.checkpoint.unfinished import Lock, is_temporary, temporary_name


def save_step(folder: str, step: int) -> str:
    value = torch.full((3,), float(step))
    return save(
        f"{folder}/step={step}.ckpt",
        model={"w": value},
        optimizer={"m": value},
        state={"step": step, "x": value},
        meta={"global_step": step, "epoch": 0},
    )


def newest_step(folder: str) -> int:
    """The step of the newest whole checkpoint, whose parts must all tell of that step."""
    path, _ = find_newest([folder])
    assert path is not None and verify(path) == []
    loaded = load(path)
    step = loaded.meta["global_step"]
    assert loaded.state["step"] == step
    for tensor in (loaded.model["w"], loaded.optimizer["m"], loaded.state["x"]):
        assert torch.equal(tensor, torch.full((3,), float(step)))
    return int(step)


class Fault:
    """Fails the n-th change to a storage, and all that follow if told to."""

    def __init__(self, n: int, lasting: bool) -> None:
        self.n, self.lasting, self.seen, self.fired = n, lasting, 0, False

    def __call__(self, kind: str, path: str) -> None:
        self.seen += 1
        if self.seen == self.n or (self.lasting and self.seen > self.n):
            self.fired = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "runs") if request.param == "disk" else f"memory://bucket/{uuid.uuid4().hex}"


@pytest.mark.parametrize("lasting", [False, True])
def test_a_save_that_fails_anywhere_leaves_the_older_checkpoint_whole(
    folder: str, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_step(folder, 1)
    files = storage_of(first)[0].list(first)
    failures = 0
    for n in range(1, 1000):
        fault = Fault(n, lasting)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "changing", fault)
            try:
                save_step(folder, 2)
            except CheckpointError as error:
                assert "No space left on device" in str(error) and "step=2" in str(error)
                failures += 1
        assert verify(first) == [] and storage_of(first)[0].list(first) == files
        if not fault.fired:
            break
        if newest_step(folder) == 2:  # the last sync of all failed: the save is whole, if perhaps not durable
            remove(str(find_newest([folder])[0]))
        assert newest_step(folder) == 1
    assert failures > 12
    assert newest_step(folder) == 2
    if not lasting:  # where the disk takes no orders at all, what was begun has to stay
        leftovers = [name for name in storage_of(folder)[0].list(folder) if not name.startswith("step=")]
        assert leftovers == []


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc to name what is synced")
def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name_and_the_name_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(old: str, new: str) -> None:
        events.append(("rename", old))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    path = Path(save_step(str(tmp_path), 1))
    (at,) = (i for i, (kind, _) in enumerate(events) if kind == "rename")
    folder = events[at][1]
    manifest = events.index(("sync", f"{folder}/manifest.json"))
    for name in {file.name for file in path.iterdir()} - {"manifest.json"}:
        assert events.index(("sync", f"{folder}/{name}")) < manifest
    assert manifest < events.index(("sync", folder)) < at
    assert events[-1] == ("sync", str(tmp_path)) and len(events) - 1 > at


def test_a_removal_that_fails_anywhere_leaves_the_other_checkpoint_whole(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(folder, 1)
    for n in range(1, 100):
        path = save_step(folder, 2)
        fault = Fault(n, lasting=True)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "changing", fault)
            try:
                remove(path)
            except CheckpointError as error:
                assert "could not be removed" in str(error)
        if not fault.fired:
            break
        if n == 1:
            assert newest_step(folder) == 2
            remove(path)
        assert newest_step(folder) == 1
    assert n > 5 and newest_step(folder) == 1


def test_a_pointer_that_fails_anywhere_points_to_the_old_or_the_new(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = save_step(folder, 1), save_step(folder, 2)
    for n in range(1, 100):
        write_pointer(f"{folder}/last.ckpt", old)
        fault = Fault(n, lasting=False)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "changing", fault)
            try:
                write_pointer(f"{folder}/last.ckpt", new)
            except CheckpointError as error:
                assert "No space left" in str(error)
        if not fault.fired:
            break
        assert resolve_pointer(f"{folder}/last.ckpt") in (old, new)
    assert resolve_pointer(f"{folder}/last.ckpt") == new
    assert not any(is_temporary(name) for name in storage_of(folder)[0].list(folder))


# Forks from a process without threads, because importing torch for every kill would take minutes.
KILLS = """
import json, os, random, signal, sys, time
sys.path[:0] = [os.path.dirname(os.environ["FAULTS"])]
from test_checkpoint_faults import newest_step, save_step
from paceline.trainer.checkpoint import storage

folder, first = sys.argv[1], save_step(sys.argv[1], 1)
newest = [newest_step(folder)]

def run(child):
    pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    return pid

def killed_at(n):
    seen = 0
    def changing(kind, path):
        nonlocal seen
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
    storage.changing = changing
    save_step(folder, step)

at_writes, step = 0, 2
while True:
    status = os.waitpid(run(lambda: killed_at(at_writes + 1)), 0)[1]
    newest.append(newest_step(folder))
    step = max(newest) + 1
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    at_writes += 1

def keep_saving():
    for i in range(step, step + 1000):
        save_step(folder, i)

random.seed(0)
for _ in range(20):
    pid = run(keep_saving)
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    newest.append(newest_step(folder))
    step = newest[-1] + 1
save_step(folder, step)
print(json.dumps({"at_writes": at_writes, "newest": newest, "left": os.listdir(folder)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_every_write_and_at_random_times_costs_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "FAULTS": __file__, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLS, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["at_writes"] > 20
    assert told["newest"] == sorted(told["newest"]), "a newer checkpoint was lost"
    if sys.platform == "linux":
        assert not [name for name in told["left"] if is_temporary(name)], "what the killed ones left was not removed"


def test_only_what_a_dead_process_of_this_machine_left_is_removed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("elsewhere nothing can be proved dead")
    mine = temporary_name("mine.ckpt")
    boot, pid, _, token = mine.rsplit("-", 4)[1:]
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = f"{boot}-{int(gone.stdout)}-1-{token}"
    names = {
        mine: "stays",  # its writer lives
        f".tmp-reborn-{boot}-{pid}-1-{token}": "goes",  # another process has its number by now
        f".tmp-dead-{dead}": "goes",
        f".tmp-locked-{dead}": "stays",  # a process that we cannot see, in another container, holds it
        f".tmp-other-boot-{'0' * 12}-{int(gone.stdout)}-1-{token}": "stays",  # perhaps of another machine
        ".tmp-mine": "stays",
        f"dead-{dead}": "stays",
        f".tmp-deep-{dead}": "stays",  # no save makes folders in it
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / f".tmp-deep-{dead}" / "folder").mkdir()
    (tmp_path / f".tmp-last.ckpt-{dead}").write_text("{}")
    lock = Lock(str(tmp_path / f".tmp-locked-{dead}"))
    assert lock.held
    save(tmp_path / "x", model={}, meta={"global_step": 1, "epoch": 0})
    lock.release()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {name for name, fate in names.items() if fate == "stays"} | {"x.ckpt"}


def test_a_temporary_folder_never_counts_even_with_a_manifest(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "x", model={}, meta={"global_step": 1, "epoch": 0}))
    unfinished = path.rename(tmp_path / temporary_name("x.ckpt"))
    assert find_newest([tmp_path]) == (None, [])
    with pytest.raises(CheckpointError, match="never finished"):
        load(unfinished)


def test_a_save_in_a_place_where_another_just_came_first_takes_the_next_name(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[str] = []

    def race(kind: str, path: str) -> None:
        if not raced and (kind == "rename" or path.endswith("index.json")) and "/.tmp-" not in path:
            raced.append(path)
            raced.append(save_step(folder, 1))

    monkeypatch.setattr(storage, "changing", race)
    late = save_step(folder, 1)
    assert raced[1].endswith("step=1.ckpt") and late.endswith("step=1-v1.ckpt")
    assert verify(late) == [] and verify(raced[1]) == []


def test_a_manifest_that_arrived_though_its_put_failed_is_taken_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"memory://bucket/{uuid.uuid4().hex}"
    save_step(folder, 1)
    real = storage.ObjectStore.replace

    def replace(self: storage.ObjectStore, path: str, data: bytes, temporary: str) -> None:
        real(self, path, data, temporary)
        if path.endswith("manifest.json"):
            raise TimeoutError("no answer")

    for kept in range(8):
        removed: list[str] = []

        def fail_later(kind: str, path: str, kept: int = kept, removed: list[str] = removed) -> None:
            if kind == "remove":
                removed.append(path)
                if len(removed) > kept:
                    raise ConnectionError("cut")

        with monkeypatch.context() as patch:
            patch.setattr(storage.ObjectStore, "replace", replace)
            patch.setattr(storage, "changing", fail_later)
            with pytest.raises(CheckpointError, match="no answer"):
                save_step(folder, 2)
        path, skipped = find_newest([folder])
        assert path is not None and newest_step(folder) == (2 if kept == 0 else 1)
        assert all("no manifest.json" in reason for _, reason in skipped)
        if kept == 0:
            remove(path)


def test_an_interrupt_during_a_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(kind: str, path: str) -> None:
        if path.endswith("model.safetensors"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "changing", interrupt)
        save_step(str(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []
