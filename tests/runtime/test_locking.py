"""One run in a folder at a time."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime import locking
from runtime.errors import UserError, WorkError
from runtime.locking import RunLock, this_process


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    """A lock of another host that looks old is watched for 0.1 s."""
    monkeypatch.setattr(locking, "WATCHED_RENEWALS", 0.1 / locking.RENEW_EVERY)


@pytest.fixture
def held(tmp_path):
    """A lock whose content and age a test chooses."""

    def write(age: float = 0, **changes):
        path = tmp_path / ".lock"
        path.write_text(json.dumps({**this_process(), **changes}))
        os.utime(path, (time.time() - age,) * 2)

    return write


def take(folder) -> RunLock:
    lock = RunLock(folder)
    lock.take()
    return lock


def test_it_is_gone_when_it_is_released(tmp_path):
    lock = take(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text()) == this_process()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_living_process_of_this_host_is_named(tmp_path, held):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held(pid=other.pid, started=locking._start_time(other.pid), job="77", age=10_000)
    with pytest.raises(UserError, match=rf"process {other.pid} on this host trains into it \(Slurm job 77\)"):
        take(tmp_path)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and nobody has asked for its exit code
    assert Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    take(tmp_path).release()  # at once when it is gone
    other.wait()
    take(tmp_path).release()


def test_a_lock_of_another_name_and_for_other_work_says_so_and_leaves_the_folders_own_alone(tmp_path, held):
    words = (".captions.lock", "writes captions", "name another --output")
    other = RunLock(tmp_path, *words)
    other.take()
    assert [path.name for path in tmp_path.iterdir()] == [".captions.lock"]
    take(tmp_path).release()
    (tmp_path / ".captions.lock").write_text(json.dumps({**this_process(), "host": "node7"}))
    with pytest.raises(UserError, match="on node7 writes captions, and was .*; wait for it, or name another --output"):
        RunLock(tmp_path, *words).take()
    (tmp_path / ".captions.lock").write_text(json.dumps({**this_process(), "pid": 1, "started": "gone"}))
    RunLock(tmp_path, *words).take()
    other.release()


def test_a_number_that_another_process_has_now_counts_as_gone(tmp_path, held):
    held(pid=1, started="before the machine was started")
    take(tmp_path).release()


def test_another_host_is_believed_until_it_has_been_silent_for_long(tmp_path, held):
    held(host="node7", age=60)
    with pytest.raises(UserError, match=r"on node7 trains into it, and was alive \d+ s ago"):
        take(tmp_path)
    held(host="node7", age=locking.STALE_AFTER + 1)
    take(tmp_path).release()


@pytest.mark.parametrize("age", [-locking.STALE_AFTER - 1, locking.STALE_AFTER + 1], ids=["back", "forwards"])
def test_a_clock_that_jumps_does_not_make_a_living_holder_look_dead(tmp_path, held, capfd, age):
    lock, before = tmp_path / ".lock", time.time() - age
    held(host="node7", age=age)
    renewal = threading.Timer(0.02, os.utime, [lock])
    renewal.start()
    with pytest.raises(UserError, match="on node7 trains into it"):
        take(tmp_path)
    renewal.join()
    assert abs(lock.stat().st_mtime - before) > 1 and "not renewed for long" in capfd.readouterr().err


def test_a_lock_from_the_future_that_nobody_renews_is_taken_over(tmp_path, held):
    """The clock was set back: a holder that lives renews its lock to the new time."""
    held(host="node7", age=-locking.STALE_AFTER - 1)
    take(tmp_path).release()


def test_a_folder_that_was_moved_is_followed_and_its_lock_renewed_there(tmp_path, monkeypatch):
    out, moved = tmp_path / "out", tmp_path / "moved"
    lock = take(out)
    assert not lock.follow_folder() and lock.folder == out
    out.rename(moved)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").write_text(json.dumps({**this_process(), "host": "node7"}))
    (tmp_path / "other").rename(out)  # another run's: no reason to end, as a lock that was taken over is
    os.utime(moved / ".lock", (0, 0))
    lock.renew()
    assert (moved / ".lock").stat().st_mtime > 0
    assert not lock.follow_folder() and lock.folder == moved
    lock.release()
    assert not list(moved.iterdir()) and (out / ".lock").exists()


def test_a_folder_that_was_removed_is_made_again_with_its_lock(tmp_path):
    lock = take(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert lock.follow_folder() and json.loads(lock.path.read_text()) == this_process()
    lock.release()
    assert not list((tmp_path / "out").iterdir())


def test_a_copy_in_the_folders_place_is_the_same_folder(tmp_path):
    lock = take(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(tmp_path / "out")
    assert not lock.follow_folder() and lock.folder == tmp_path / "out"
    lock.release()


def test_a_container_that_shares_the_hosts_name_counts_as_another_host(tmp_path, held):
    held(space="another", pid=1, started="then")
    with pytest.raises(UserError, match="process 1 on"):
        take(tmp_path)


def test_one_that_was_taken_over_while_it_stood_still_ends(tmp_path):
    script = """
import sys, time
sys.path.insert(0, sys.argv[1])
from runtime import locking
from pathlib import Path
locking.RENEW_EVERY = 0.05
lock = locking.RunLock(Path(sys.argv[2]))
lock.take()
lock.path.write_text("{}")  # somebody else's
time.sleep(60)
"""
    scripts = str(Path(locking.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, scripts, tmp_path], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and "taken over by another run" in done.stderr


def test_where_no_lock_can_be_made_is_one_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(WorkError, match="cannot be made"):
        take(tmp_path)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_the_users_to_change(tmp_path, monkeypatch, reason):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match="name another --output_dir"):
        take(tmp_path)


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(locking.os, "link", no_links)
    lock = take(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text()) == this_process()
    lock.release()


def test_a_requeued_job_takes_over_from_itself_at_once(tmp_path, held, monkeypatch):
    held(host="node7", job="42", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(UserError, match="Slurm job 42"):  # a second run in the same job
        take(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_lock_that_a_crash_cut_short_holds_nobody_back(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    take(tmp_path).release()


def test_it_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "RENEW_EVERY", 0.01)
    lock = take(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    end = time.monotonic() + 20
    while (tmp_path / ".lock").stat().st_mtime == 0:
        assert time.monotonic() < end
    lock.release()


def _compete(folder, start, won):
    start.wait()
    try:
        take(folder)
    except UserError:
        won.put(False)
    else:
        won.put(True)
    signal.pause()  # lives until all have been counted: the lock of one that has ended may rightly be taken over


def test_of_many_that_come_at_once_one_gets_it(tmp_path, held):
    held(pid=1, started="gone")
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        start, won = fork.Barrier(6), fork.SimpleQueue()
        crowd = [fork.Process(target=_compete, args=(tmp_path, start, won)) for _ in range(6)]
        for process in crowd:
            process.start()
        winners = sum(won.get() for _ in crowd)
        for process in crowd:
            process.kill()  # leaves the lock behind for the next round
            process.join()
        assert winners == 1


@pytest.mark.parametrize("below", [".", "further"])
def test_a_file_where_the_folder_should_be_is_the_users_mistake(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*cannot be made.*--output_dir"):
        RunLock(tmp_path / "file" / below).take()
