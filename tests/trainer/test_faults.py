from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import textwrap
import time
import weakref
from collections.abc import Iterator

import pytest

from paceline.trainer.faults import reported

from helpers.scripts import run_command, run_script, start_script

RANKS = """
    import os, sys, time
    from paceline.trainer.faults import reported
    if "RANK" not in os.environ:
        from paceline.trainer.launch import start_ranks
        start_ranks(2)
    import torch
    from torch import distributed
    rank = int(os.environ["RANK"])

    def run(body):
        with reported(rank=rank, world_size=2, where=lambda: "epoch 0, batch 3"):
            body()

    def say(text):
        os.write(1, f"{text} {rank}\\n".encode())  # whole, while the others write
"""


def ranks(body: str) -> str:
    """A script that starts two ranks, which run `body`."""
    return textwrap.dedent(RANKS) + textwrap.dedent(body)


@pytest.fixture
def excepthook(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield sys.excepthook


RAISES_BESIDE_ONE_THAT_WAITS = ranks("""
    distributed.init_process_group("gloo")

    def body():
        say("some output of rank")
        if rank == 1:
            # What a rank may have about it when it fails: a data loader's workers, a collective that never ends.
            batches = iter(torch.utils.data.DataLoader(range(1000), num_workers=1))
            next(batches)
            distributed.all_reduce(torch.ones(1), async_op=True)
            raise ValueError("no such pixel")
        distributed.barrier()
        distributed.barrier()

    run(body)
""")


def test_the_exception_of_one_rank_is_printed_once_and_last_with_its_rank() -> None:
    result = run_script(RAISES_BESIDE_ONE_THAT_WAITS)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.startswith("\nrank 1 of 2 (host ")
    assert "pid " in result.stderr.splitlines()[1]
    assert result.stderr.splitlines()[1].endswith("failed in epoch 0, batch 3:")
    assert result.stderr.endswith("\nValueError: no such pixel\n")
    assert result.left_behind == []


def test_under_torchrun_the_rank_prints_its_exception_itself_and_once() -> None:
    result = run_script(RAISES_BESIDE_ONE_THAT_WAITS, launcher="torchrun")
    assert result.returncode == 1
    assert result.stderr.count("failed in epoch 0, batch 3:") == 1
    assert result.stderr.count("ValueError: no such pixel") == 1
    assert "closed by peer" not in result.stderr
    assert result.left_behind == []


def test_when_all_ranks_raise_one_is_printed_though_they_are_not_connected_yet() -> None:
    result = run_script(ranks("""run(lambda: int(f"too hot on rank {rank}"))"""))
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == result.stderr.count("ValueError: invalid literal") == 1
    assert result.stderr.startswith(f"\nrank {result.stderr.rstrip()[-2]} of 2 ")


def test_a_failure_in_the_wake_of_another_counts_as_that_failure() -> None:
    result = run_script(
        ranks("""
        try:
            run(lambda: int("three"))
        except ValueError as error:
            raise SystemError("the run is over") from error
        """),
        env={"RANK": "1"},  # by a launcher that is not ours, with no store yet
    )
    assert result.returncode == 1
    assert result.stderr.count("rank 1 of 2") == 1
    assert "ValueError: invalid literal" in result.stderr
    assert result.stderr.endswith("SystemError: the run is over\n")


def test_ctrl_c_in_a_run_raises_in_the_ranks_and_prints_nothing() -> None:
    script = ranks("""
        distributed.init_process_group("gloo")

        def body():
            try:
                distributed.barrier()
                say("in the run")
                if rank == 0:
                    time.sleep(60)
                distributed.barrier()
            finally:
                say("cleaned up")

        run(body)
        """)
    with start_script(script) as running:
        running.wait_for_output("in the run 0")
        running.wait_for_output("in the run 1")
        os.kill(running.pid, signal.SIGINT)  # to the parent alone; the terminal signals its process group
        started = time.monotonic()
        result = running.wait()
    assert time.monotonic() - started < 10
    assert (result.returncode, result.stderr) == (130, "")
    assert "cleaned up 0" in result.stdout
    assert "cleaned up 1" in result.stdout
    assert result.left_behind == []


def test_one_process_has_pythons_own_traceback(excepthook: object) -> None:
    with pytest.raises(ValueError), reported(rank=0, world_size=1, where=str):
        int("three")
    assert sys.excepthook is excepthook


def test_nothing_is_installed_before_a_failure(excepthook: object) -> None:
    with reported(rank=0, world_size=2, where=str):
        assert sys.excepthook is excepthook
    assert sys.excepthook is excepthook


def test_a_failed_rank_leaves_other_exceptions_to_the_hook_before(excepthook: object) -> None:
    seen: list[BaseException] = []
    sys.excepthook = lambda kind, error, trace: seen.append(error)
    with pytest.raises(ValueError), reported(rank=0, world_size=2, where=str):
        int("three")
    unrelated = KeyError("x")
    sys.excepthook(KeyError, unrelated, None)
    assert seen == [unrelated]


def test_an_exception_that_the_user_catches_is_not_printed(
    excepthook: object, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with contextlib.suppress(ValueError), reported(rank=0, world_size=2, where=str):
            int("three")
    assert capfd.readouterr() == ("", "")


def test_an_exception_that_was_caught_is_not_kept_alive(excepthook: object) -> None:
    class Tensor:
        pass

    def fail() -> None:
        seen.append(weakref.ref(tensor := Tensor()))
        raise MemoryError(f"no room beside {tensor}")

    seen: list[weakref.ref[Tensor]] = []
    with contextlib.suppress(MemoryError), reported(rank=0, world_size=2, where=str):
        fail()
    gc.collect()
    assert seen[0]() is None


def test_system_exit_is_no_failure(excepthook: object) -> None:
    with pytest.raises(SystemExit), reported(rank=0, world_size=2, where=str):
        raise SystemExit(75)
    assert sys.excepthook is excepthook


def test_importing_faults_imports_no_torch() -> None:
    code = "import sys; from paceline.trainer import cli, faults, launch, rank_zero; sys.exit('torch' in sys.modules)"
    result = run_command("python", "-c", code)
    assert result.returncode == 0, result.stderr


def test_a_rank_that_lost_the_store_prints_one_line() -> None:
    """Without an agent, as under srun, rank 0 holds the store; the others may outlive it."""
    code = """
        from torch import distributed
        from paceline.trainer import faults
        class Gone:
            def add(self, key, value):
                raise distributed.DistNetworkError("connection reset")
        faults._shared_store = Gone
        with faults.reported(rank=1, world_size=2, where=lambda: "epoch 2, batch 5"):
            raise RuntimeError("closed by peer")
    """
    result = run_script(code)
    assert result.returncode == 1
    _, first, second = result.stderr.splitlines()
    assert first.startswith("rank 1 of 2 ")
    assert second == "RuntimeError: closed by peer"
