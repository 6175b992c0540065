"""The helpers that start real ranks and real scripts, on which the other tests stand.

The functions above the tests are what ranks run. A test that makes a job hang is followed by a new pool.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.ranks import RanksFailed, run_ranks
from helpers.scripts import ScriptTimedOut, run_command, run_script, start_script

LAUNCH_VARIABLES = ["RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]


def rank_and_argument(argument: str, twice: bool = False) -> tuple[int, str]:
    return int(os.environ["RANK"]), argument * (1 + twice)


def sum_of_ranks() -> Tensor:
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return total


def launch_variables() -> list[str]:
    return [os.environ[name] for name in LAUNCH_VARIABLES]


def port() -> int:
    return int(os.environ["MASTER_PORT"])


def fail_on(rank: int) -> None:
    sum_of_ranks()
    print(f"hello from rank {dist.get_rank()}")
    if dist.get_rank() == rank:
        raise KeyError("rank_one_gave_up")
    dist.barrier()


def fail_while_others_sleep() -> None:
    if os.environ["RANK"] == "0":
        raise ValueError("too early")
    sleep_long()


def sleep_long() -> None:
    time.sleep(600)


def wait_for_a_rank_that_never_comes() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        sleep_long()


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave_a_mess() -> None:
    sum_of_ranks()
    os.environ["PACELINE_MESS"] = "1"
    os.chdir("/")
    random.seed(os.getpid())
    torch.rand(3)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.path.append("/mess")


def what_a_job_finds() -> dict[str, object]:
    return {
        "process group": dist.is_initialized(),
        "variable": os.environ.get("PACELINE_MESS"),
        "folder": os.getcwd(),
        "random": [random.random(), torch.rand(()).item()],
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "SIGTERM": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "path": "/mess" in sys.path,
        "cuda": torch.cuda.is_available(),
    }


def speak() -> int:
    print("to stdout")
    print("to stderr", file=sys.stderr, flush=True)
    os.system("echo from a child")
    return os.getpid()


def give_a_function() -> object:
    return lambda: None


class Methods:
    def method(self) -> None: ...


def test_results_come_by_rank() -> None:
    assert run_ranks(rank_and_argument, 2, "a", twice=True) == [(0, "aa"), (1, "aa")]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_form_one_gloo_job(world_size: int) -> None:
    expected = torch.tensor([float(sum(range(world_size)))])
    assert run_ranks(sum_of_ranks, world_size) == [expected] * world_size


def test_ranks_have_the_variables_of_torchrun() -> None:
    assert run_ranks(launch_variables, 2) == [
        ["0", "0", "0", "2", "2", "127.0.0.1"],
        ["1", "1", "0", "2", "2", "127.0.0.1"],
    ]


def test_each_job_has_a_port_of_its_own() -> None:
    ports = [set(run_ranks(port, 2)) for _ in range(5)]
    assert [len(of_one_job) for of_one_job in ports] == [1] * 5
    assert len(set.union(*ports)) == 5


def test_jobs_share_processes_but_no_state(tmp_path: Path) -> None:
    pids = list(run_ranks(os.getpid, 2))
    before = run_ranks(what_a_job_finds, 2)
    run_ranks(leave_a_mess, 2)
    assert run_ranks(what_a_job_finds, 2) == before
    assert run_ranks(os.getpid, 2) == pids
    assert before[0] == before[1]
    assert before[0]["folder"] == str(tmp_path)
    assert not before[0]["process group"]
    assert before[0]["threads"] == 1


def test_the_tests_environment_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_MESS", "wanted")
    assert [found["variable"] for found in run_ranks(what_a_job_finds, 2)] == ["wanted", "wanted"]


def test_what_ranks_write_comes_with_the_results() -> None:
    for output in run_ranks(speak, 2).outputs:
        assert output.splitlines() == ["to stdout", "to stderr", "from a child"]


def test_an_exception_in_one_rank_ends_the_collectives_of_the_others() -> None:
    pids = list(run_ranks(os.getpid, 2))
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail_on, 2, rank=1)
    assert next(iter(failed.value.errors)) == 1, "the cause comes first"
    error = failed.value.errors[1]
    assert (error.type_name, error.message) == ("KeyError", "'rank_one_gave_up'")
    assert "in fail_on" in error.traceback
    assert "rank 1 raised KeyError: 'rank_one_gave_up'" in str(failed.value)
    assert "hello from rank 0" in failed.value.outputs[0]
    assert "hello from rank 1" in str(failed.value)
    assert run_ranks(os.getpid, 2) == pids, "no rank hung, so the pool is kept"


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_rank() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 raised .*lambda"):
        run_ranks(give_a_function, 1)


def test_functions_that_have_no_importable_name_are_refused() -> None:
    def closure() -> None: ...

    for function in (closure, lambda: None, Methods().method):
        with pytest.raises(TypeError, match="Define it with def at the top of the test's file"):
            run_ranks(function, 2)
    with pytest.raises(ValueError, match="world_size=0"):
        run_ranks(port, 0)


def test_a_failure_stops_ranks_that_do_not_notice_and_the_pool_recovers() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="raised ValueError: too early; rank 1 did not finish") as failed:
        run_ranks(fail_while_others_sleep, 2)
    assert time.monotonic() - start < 10
    assert list(failed.value.errors) == [0]
    assert "in sleep_long" in failed.value.stacks[1]
    assert run_ranks(rank_and_argument, 2, "a") == [(0, "a"), (1, "a")]


def test_the_time_limit_shows_the_stacks_of_all_ranks() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(wait_for_a_rank_that_never_comes, 2, timeout_seconds=2)
    assert failed.value.errors == {}
    assert "in barrier" in failed.value.stacks[0]
    assert "in sleep_long" in failed.value.stacks[1]
    for rank in (0, 1):
        assert "in wait_for_a_rank_that_never_comes" in failed.value.stacks[rank]
        assert failed.value.stacks[rank] in str(failed.value)


def test_a_rank_that_dies_is_named_with_its_exit_code_and_stacks() -> None:
    with pytest.raises(RanksFailed, match="raised ProcessDied: the rank's process ended with code -11") as failed:
        run_ranks(die, 1)
    assert "in die" in failed.value.errors[0].traceback


SESSION_THAT_HANGS = """
    import os, time
    from helpers.ranks import run_ranks
    run_ranks(os.getpid, 1)
    print("pool is up")
    run_ranks(time.sleep, 1, 600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_session(number: signal.Signals) -> None:
    with start_script(SESSION_THAT_HANGS, env={"PYTHONPATH": os.pathsep.join(sys.path)}) as session:
        session.wait_for_output("pool is up")
        assert len(session.processes()) == 2
        session.interrupt(number)
        result = session.wait()
    assert result.returncode == -number, result.stderr
    assert result.left_behind == []


def test_a_script_runs_with_its_arguments_and_environment() -> None:
    source = "import os, sys; print(sys.argv[1:], os.environ['WORD'], 'HOME' in os.environ); sys.exit('no')"
    result = run_script(source, "--lr", 0.1, env={"WORD": "word", "HOME": None})
    assert (result.returncode, result.stdout, result.stderr) == (1, "['--lr', '0.1'] word False\n", "no\n")
    assert run_command("python", "-c", "import sys; print(sys.executable)").stdout == f"{sys.executable}\n"


def test_a_script_under_torchrun_is_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "say_rank.py"
    # The line and its end in one write: the other rank writes to the same pipe.
    script.write_text("import os; print(f'rank {os.environ[\"RANK\"]} of {os.environ[\"WORLD_SIZE\"]}\\n', end='')")
    result = run_script(script, launcher="torchrun", nproc=2)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


SCRIPT_WITH_A_CHILD = """
    import subprocess, sys, time
    code = "import time\\ndef child_waits():\\n    time.sleep(600)\\nchild_waits()"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    def script_waits():
        print("waiting")
        time.sleep(float(sys.argv[1]))
    script_waits()
"""


def test_the_time_limit_of_a_script_shows_the_stacks_of_all_its_processes() -> None:
    with pytest.raises(ScriptTimedOut, match="did not end within 2 s") as timed_out:
        run_script(SCRIPT_WITH_A_CHILD, 600, timeout_seconds=2)
    assert timed_out.value.stdout == "waiting\n"
    assert "in script_waits" in timed_out.value.stderr
    assert "in child_waits" in str(timed_out.value)


def test_processes_that_a_script_leaves_behind_are_listed_and_killed() -> None:
    with start_script(SCRIPT_WITH_A_CHILD, 0) as script:
        result = script.wait(gone_seconds=0.3)
        (child,) = script.processes()
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.left_behind] == [str(child.pid)]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
