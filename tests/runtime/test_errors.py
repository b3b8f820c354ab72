"""How a script ends: its exit code, and one line instead of a traceback."""

import errno

import pytest
import torch

from runtime.errors import Stopped, UserError, WorkError, exit_with, first_line


def end(problem: BaseException | None = None, code: int | None = None):
    def work() -> int | None:
        if problem:
            raise problem
        return code

    with pytest.raises(SystemExit) as ended:
        exit_with(work)
    return ended.value.code


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (UserError("--steps: wrong"), 2, "error: --steps: wrong"),
        (WorkError("2 of 3 pictures"), 1, "error: 2 of 3 pictures"),
        (PermissionError(errno.EACCES, "Permission denied", "pictures"), 2, "pictures: no permission"),
        (OSError(errno.EROFS, "Read-only file system", "cache"), 2, "cache: on a read-only disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "run.json"), 1, "run.json"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "run.json"), 1, "quota exceeded"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 1, "make room"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "--dataloader_num_workers"),
        (ImportError("libtorch_cuda.so: failed to map segment from shared object"), 1, "ulimit"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "ulimit"),
        (RuntimeError("can't start new thread"), 1, "ulimit"),
        (MemoryError(), 1, "not enough memory"),
        (Stopped("SIGTERM: stopped after step 3"), 75, "SIGTERM: stopped after step 3"),
    ],
)
def test_an_expected_error_ends_with_its_code_and_one_line(capsys, problem, code, said):
    assert end(problem) == code
    [line] = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_an_expected_error_is_known_by_its_cause_too(capsys):
    wrapped = RuntimeError("Failed to import a module because of the following error:")
    wrapped.__cause__ = ImportError("libblas.so: failed to map segment from shared object")
    assert end(wrapped) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "ulimit" in line and "libblas.so" in line


def test_a_lost_connection_is_expected_only_in_a_run_of_several_processes(capsys, monkeypatch):
    lost = RuntimeError("[pair.cc:545] Connection closed by peer [127.0.0.1]:4")
    with pytest.raises(RuntimeError):
        end(lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end(lost) == 1 and "another process of this run" in capsys.readouterr().err


def test_out_of_memory_is_one_line_with_the_flags_that_help(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: torch.empty(1 << 60))
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "not enough memory" in line and "--gradient_checkpointing" in line


def test_finished_work_ends_with_its_own_code_or_0():
    assert (end(), end(code=75)) == (0, 75)


@pytest.mark.parametrize("bug", [ValueError("a bug"), PermissionError(errno.EACCES, "Permission denied")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        exit_with(lambda: (_ for _ in ()).throw(bug))


def test_the_first_line_of_a_librarys_error_is_reported():
    assert first_line(OSError("no such model\n\nif this is a private one ...")) == "no such model"
    assert first_line(KeyError()) == "KeyError"


def test_any_other_broken_pipe_propagates():
    with pytest.raises(BrokenPipeError):
        exit_with(lambda: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, "Broken pipe")))
