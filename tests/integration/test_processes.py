"""Forked processes are what a new process is, so that tests may use them in the place of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support import processes

PYTHON = sys.executable


def test_it_has_arguments_environment_and_directory_of_its_own(tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['WORD'], 'PATH' in os.environ, __name__)"
    done = processes.run([PYTHON, "-c", code, "a", "b"], cwd=tmp_path, env={"WORD": "said"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"['a', 'b'] {tmp_path} said False __main__\n"


def test_nothing_of_this_process_or_of_another_one_is_there():
    code = "import sys, random, torch; print('pytest' in sys.modules, random.random(), torch.initial_seed())"
    first, second = (processes.run([PYTHON, "-c", code]).stdout.split() for _ in range(2))
    assert first[0] == "False"
    assert not set(first[1:]) & set(second[1:])


@pytest.mark.parametrize(
    "code, status",
    [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os; os._exit(4)", 4), ("raise SystemExit('x')", 1)],
)
def test_it_ends_as_any_process_does(code, status):
    assert processes.run([PYTHON, "-c", code]).returncode == status


def test_a_failure_is_shown_and_exit_handlers_run_after_it():
    done = processes.run([PYTHON, "-c", "import atexit; atexit.register(print, 'late'); print('early'); 1 / 0"])
    assert done.stdout == "early\nlate\n"
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_threads_are_waited_for_at_the_end():
    code = "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('done'))).start()"
    assert processes.run([PYTHON, "-c", code]).stdout == "done\n"


def test_modules_and_files_can_be_run(tmp_path):
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1], sys.path[0])")
    done = processes.run([PYTHON, "program.py", "x"], cwd=tmp_path)
    assert done.stdout == f"x {tmp_path}\n"
    assert processes.run([PYTHON, "-m", "checkpointer", "--version"]).stdout.startswith("checkpointer")


def test_what_runs_can_be_talked_to_and_killed():
    code = "import sys; print('ready', flush=True); print(sys.stdin.readline(), flush=True); sys.stdin.readline()"
    with processes.Process([PYTHON, "-c", code]) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "hello\n"
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL


def test_one_that_takes_too_long_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([PYTHON, "-c", "import time; time.sleep(60)"], timeout=0.2)
