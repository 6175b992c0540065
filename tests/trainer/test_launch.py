from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from paceline.errors import LaunchError
from paceline.trainer import agent, launch
from paceline.trainer.cli import main

from helpers.scripts import RunningScript, run_command, run_script, start_command, start_script

START = """
    import json, os, signal, subprocess, sys
    if "RANK" not in os.environ:
        from paceline.trainer.launch import start_ranks
        start_ranks(2)
    rank = int(os.environ["RANK"])

    def say(text):
        os.write(1, f"{text}\\n".encode())  # whole, while the others write
"""


def ranks(body: str) -> str:
    """A script that starts two ranks, which run `body`; they import no torch, to be quick."""
    return textwrap.dedent(START) + textwrap.dedent(body)


TELLS_HOW_IT_WAS_STARTED = ranks("""
    facts = sys.argv[1:], sys.flags.optimize, sys.flags.dev_mode, sys.warnoptions, os.getcwd(), __name__
    say(f"{json.dumps(facts)} rank {rank}")
""")

WORKS_FOR_A_MINUTE = ranks("""
    subprocess.Popen(["sleep", "60"])
    say(f"rank {rank} works")
    signal.alarm(60)
    signal.pause()
""")


def wait_until_ranks_work(running: RunningScript) -> list[psutil.Process]:
    running.wait_for_output("rank 0 works")
    running.wait_for_output("rank 1 works")
    return psutil.Process(running.pid).children()


# --- the command line -------------------------------------------------------------------------------------------------
def test_ranks_get_the_same_command_line_and_nothing_more_is_printed(tmp_path: Path) -> None:
    Path("train.py").write_text("print('made by the parent')\n" + TELLS_HOW_IT_WAS_STARTED)
    words = ["a b", "", "$$ ${local_rank}", "-m", "--lr=0.1", "ä"]
    result = run_command("python", "-O", "-X", "dev", "-W", "ignore", "-Wonce", "train.py", *words)
    assert (result.returncode, result.stderr) == (0, "")
    facts = '["a b", "", "$$ ${local_rank}", "-m", "--lr=0.1", "\\u00e4"], 1, true, ["default", "ignore", "once"]'
    told = sorted(line for line in result.stdout.splitlines() if "__main__" in line)
    assert told == [f'[{facts}, "{tmp_path}", "__main__"] rank {rank}' for rank in range(2)]
    assert result.stdout.startswith("made by the parent\n")


def test_a_module_is_run_as_a_module(tmp_path: Path) -> None:
    package = Path("project")
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "settings.py").write_text("COLOUR = 'green'")
    (package / "train.py").write_text("from .settings import COLOUR\n" + TELLS_HOW_IT_WAS_STARTED)
    result = run_command("python", "-um", "project.train", "--lr", "0.1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count('[["--lr", "0.1"], 0, false, []') == 2


def test_a_program_on_the_path_that_changed_its_folder_is_found_again(tmp_path: Path) -> None:
    program = Path("trains")
    program.write_text(f"#!{sys.executable}\nimport os; os.chdir('/')\n" + TELLS_HOW_IT_WAS_STARTED)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    result = run_command("./trains", "x", env={"PWD": str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count('[["x"], 0, false, [], "/"') == 2


def test_threads_are_shared_out_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert agent._environment(2, tmp_path)["OMP_NUM_THREADS"] == "4"
    assert agent._environment(16, tmp_path)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in agent._environment(1, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in agent._environment(2, tmp_path)


@pytest.mark.parametrize(
    ("command_line", "program"),
    [
        ("python train.py -m x", ("script", "train.py", 1)),
        ("python -X dev -W ignore -OO train.py", ("script", "train.py", 6)),
        ("python -Xdev -Wignore -uW ignore train.py", ("script", "train.py", 5)),
        ("python -m project.train", ("-m", "project.train", 1)),
        ("python -Im project.train", ("-m", "project.train", 1)),
        ("python -mproject", ("-m", "project", 1)),
        ("python --check-hash-based-pycs always train.py", ("script", "train.py", 3)),
        ("python -- -odd.py", ("script", "-odd.py", 2)),
        ("python -c pass train.py", ("-c", "pass", 1)),
        ("python -Ec pass", ("-c", "pass", 1)),
        ("python - train.py", ("stdin", "", 1)),
        ("python -u", ("stdin", "", 2)),
    ],
)
def test_the_program_is_found_in_a_command_line(command_line: str, program: tuple[str, str, int]) -> None:
    assert launch._program(command_line.split()) == launch._Program(*program)


# --- the end of the job -----------------------------------------------------------------------------------------------
def test_the_first_failing_rank_gives_the_exit_code() -> None:
    result = run_script(ranks("sys.exit(3) if rank == 1 else (signal.alarm(60), signal.pause())"))
    assert result.returncode == 3
    assert result.stderr.startswith("\nrank 1 (pid ")
    assert result.stderr.endswith(" ended with exit code 3; the other ranks were ended.\n")
    assert result.left_behind == []


def test_ranks_that_can_be_resumed_are_waited_for_and_make_a_job_that_can() -> None:
    script = """
        from pathlib import Path
        import time
        deadline = time.monotonic() + 60
        while rank == 1 and os.path.exists(f"/proc/{Path('0').read_text()}") and time.monotonic() < deadline:
            time.sleep(0.01)
        sys.exit(75)
    """
    Path("0").write_text("self")
    result = run_script(ranks("if rank == 0: open('0', 'w').write(str(os.getpid()))\n" + textwrap.dedent(script)))
    assert (result.returncode, result.stderr) == (75, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_every_process_and_prints_nothing(number: signal.Signals) -> None:
    with start_script(WORKS_FOR_A_MINUTE) as running:
        wait_until_ranks_work(running)
        assert len(running.processes()) == 5  # the parent, two ranks, and a child of each
        started = time.monotonic()
        running.interrupt(number)
        result = running.wait()
    assert time.monotonic() - started < 5
    assert (result.returncode, result.stderr, result.left_behind) == (128 + number, "", [])


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen() -> None:
    script = ranks("""
        signal.signal(signal.SIGTERM, lambda *_: say(f"rank {rank} was asked"))
        say(f"rank {rank} works")
        signal.alarm(60)
        while True:
            signal.pause()
    """)
    with start_script(script) as running:
        wait_until_ranks_work(running)
        running.interrupt()
        running.wait_for_output("rank 0 was asked")
        running.wait_for_output("rank 1 was asked")
        running.interrupt()
        result = running.wait()
    assert (result.returncode, result.stderr, result.left_behind) == (130, "", [])


def test_a_rank_that_is_killed_is_named_with_the_signal() -> None:
    with start_script(WORKS_FOR_A_MINUTE) as running:
        victim = wait_until_ranks_work(running)[1]
        rank = victim.environ()["RANK"]
        victim.kill()
        result = running.wait()
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr.startswith(f"\nrank {rank} (pid {victim.pid}, host ")
    assert " was killed by SIGKILL (out of memory?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.left_behind == []


def test_what_follows_the_launch_runs_in_ranks_only() -> None:
    script = """
        import os
        if "RANK" not in os.environ:
            from paceline.trainer.launch import start_ranks
            for attempt in range(2):  # a program that catches everything launches once all the same
                try:
                    start_ranks(2)
                except:
                    pass
            start_ranks(2)
        os.write(1, f"rank {os.environ['RANK']}\\n".encode())
    """
    result = run_script(script)
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == ["rank 0", "rank 1"]


# --- where no launch is possible --------------------------------------------------------------------------------------
REFUSED = "from paceline.trainer.launch import check_possible; check_possible(2)"


def assert_refused(stderr: str, cause: str) -> None:
    message = stderr.splitlines()[-1]
    assert message.startswith("paceline.errors.LaunchError: devices=2 needs 2 processes, and they cannot be started")
    assert cause in message
    assert "torchrun --nproc-per-node 2" in message
    assert "devices=1" in message


def test_pytest_cannot_be_run_again_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"pytest is running.*torchrun.*devices=1"):
        launch.check_possible(2)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # as while tests are collected
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", "tests"])
    with pytest.raises(LaunchError, match="pytest is running"):
        launch.check_possible(2)


def test_code_from_the_command_line_is_refused() -> None:
    assert_refused(run_command("python", "-Wdefault", "-c", REFUSED).stderr, "`python -c`")


@pytest.mark.parametrize("words", [[], ["-"]])
def test_code_from_standard_input_is_refused(words: list[str]) -> None:
    process = subprocess.run([sys.executable, *words], input=REFUSED, text=True, capture_output=True, timeout=60)
    assert_refused(process.stderr, "standard input")


def test_an_interactive_session_is_refused() -> None:
    process = subprocess.run([sys.executable, "-i"], input=REFUSED, text=True, capture_output=True, timeout=60)
    assert "this is an interactive session" in process.stderr


def test_a_side_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
        import sys, threading, traceback
        from paceline.trainer.launch import check_possible
        thread = threading.Thread(target=check_possible, args=(2,), name="trains")
        threading.excepthook = lambda args: traceback.print_exception(args.exc_value)
        thread.start()
    """
    assert_refused(run_script(script).stderr, "the thread 'trains' is not the main thread")


def test_a_process_of_multiprocessing_is_refused() -> None:
    script = """
        import multiprocessing
        from paceline.trainer.launch import check_possible
        if __name__ == "__main__":
            multiprocessing.get_context("fork").Process(target=check_possible, args=(2,)).start()
    """
    assert_refused(run_script(script).stderr, "multiprocessing started this process")


def test_a_rank_is_refused() -> None:
    result = run_script(REFUSED, env={"RANK": "1"})
    assert_refused(result.stderr, "this process is a rank itself (RANK=1)")


def test_a_script_that_is_gone_is_refused() -> None:
    result = run_script("import os; os.remove(__file__)\n" + REFUSED)
    assert_refused(result.stderr, "does not lead to the program that runs")


def test_another_script_of_the_same_name_is_not_run_instead(tmp_path: Path) -> None:
    Path("train.py").write_text("import os; os.chdir('elsewhere')\n" + REFUSED)
    Path("elsewhere").mkdir()
    Path("elsewhere", "train.py").touch()
    result = run_command("python", "train.py", env={"PWD": None})
    assert_refused(result.stderr, "does not lead to the program that runs")


def test_several_nodes_are_started_by_a_launcher_on_each() -> None:
    result = run_script(REFUSED.replace("(2)", "(4, num_nodes=2)"), "--lr", "0.1")
    assert "LaunchError: num_nodes=2, but this process was started by no launcher" in result.stderr
    assert "torchrun --nnodes 2 --nproc-per-node 4 --node-rank R --master-addr HOST" in result.stderr
    assert "script.py --lr 0.1\n" in result.stderr


def test_the_main_thread_of_a_script_may_launch() -> None:
    assert threading.current_thread() is threading.main_thread()
    assert run_script(REFUSED).returncode == 0


# --- paceline launch --------------------------------------------------------------------------------------------------
PACELINE = ("python", "-m", "paceline.trainer.cli")


def test_paceline_launch_hands_the_programs_arguments_on_and_ends_with_its_code() -> None:
    Path("train.py").write_text(TELLS_HOW_IT_WAS_STARTED + "sys.exit(75)")
    words = ["--lr", "0.1", "--devices", "7", "--", "-m", "a b"]
    result = run_command(*PACELINE, "launch", "--devices", "2", "-m", "train", *words)
    assert (result.returncode, result.stderr) == (75, "")
    assert result.stdout.count('[["--lr", "0.1", "--devices", "7", "--", "-m", "a b"], 0') == 2


def test_two_nodes_form_one_job_and_the_failure_of_one_ends_both() -> None:
    script = """
        import os, signal, sys
        from torch import distributed
        from paceline.trainer.faults import reported
        distributed.init_process_group("gloo")
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        with reported(rank=rank, world_size=world_size, where=lambda: "epoch 1"):
            distributed.barrier()
            if rank == 1:
                raise ValueError(f"{world_size} ranks, group {os.environ['GROUP_RANK']}")
            signal.alarm(60)
            signal.pause()
    """
    Path("train.py").write_text(textwrap.dedent(script))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(rank: int) -> tuple[object, ...]:
        nodes = ("--nnodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port)
        return (*PACELINE, "launch", "--nproc-per-node", 1, *nodes, "train.py")

    with start_command(*node(0)) as first, start_command(*node(1)) as second:
        results = [first.wait(), second.wait()]
    assert [result.returncode for result in results] == [1, 1]
    assert results[1].stderr.startswith("\nrank 1 of 2 ")
    assert results[1].stderr.endswith("ValueError: 2 ranks, group 1\n")
    assert results[0].stderr.startswith("\nnode 1 (host ")
    assert "Traceback" not in results[0].stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lauch", "train.py"], "there is no command 'lauch'. Did you mean 'launch'?"),
        (["frobnicate"], "there is no command 'frobnicate'. There are: launch, "),
        (["launch", "--devices", "0", "x.py"], "argument --devices/--nproc-per-node: 0 is not at least 1"),
        (["launch", "--devices", "two", "x.py"], "argument --devices"),
        (["launch", "x.py"], "there is no file 'x.py' here"),
        (["launch", "--num-nodes", "2", "--node-rank", "2", "."], "--node-rank 2 is not one of 0 to 1"),
        (["launch", "--num-nodes", "2", "."], "needs --master-addr"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_answered_with_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import paceline

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"paceline {paceline.__version__}\n"
