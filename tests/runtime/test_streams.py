"""What cannot be printed never ends a script, and its exit code tells of the work alone."""

import os
import resource
import subprocess
import sys
import threading

import pytest

from clone import ROOT
from runtime.streams import LossyFile

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from runtime.errors import UserError, exit_with

def work():
    with open(sys.argv[2], "w") as file:  # would take the place of a stream that is closed
        for number in range(int(sys.argv[3])):
            print("said", number)
            print("and", number, file=sys.stderr)
        sys.stderr.isatty(), sys.stdout.fileno()
        file.write("done")
    if sys.argv[4] == "2":
        raise UserError("--flag: wrong")

exit_with(work)
"""
FEW, MANY = 1, 20_000  # lines: within the buffer, and more


def end(tmp_path, lines=FEW, code=0, **settings):
    """The exit code and what stderr has, once the work is found done."""
    words = [sys.executable, "-c", SCRIPT, ROOT / "text_to_image", tmp_path / "file", str(lines), str(code)]
    done = subprocess.run(words, **{"stderr": subprocess.PIPE, **settings}, text=True)
    assert (tmp_path / "file").read_text() == "done"
    said = [line for line in (done.stderr or "").splitlines() if not line.startswith("and ")]
    return done.returncode, said


@pytest.fixture
def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("lines", [FEW, MANY])
def test_a_reader_that_is_gone_ends_nothing_and_is_said_once(tmp_path, broken_pipe, lines):
    code, [said] = end(tmp_path, lines, stdout=broken_pipe)
    assert code == 0 and "standard output" in said


@pytest.mark.parametrize("lines", [FEW, MANY])
def test_a_log_on_a_full_disk_ends_nothing(tmp_path, lines):
    with open("/dev/full", "w") as full:
        code, [said] = end(tmp_path, lines, stdout=full)
        assert code == 0 and "No space left" in said
        assert end(tmp_path, lines, stdout=full, stderr=full) == (0, [])


@pytest.mark.parametrize("streams", [(1,), (2,), (0, 1, 2)])
def test_a_closed_stream_ends_nothing_and_no_file_takes_its_place(tmp_path, streams):
    def close() -> None:
        for stream in streams:
            os.close(stream)

    assert end(tmp_path, stdout=subprocess.DEVNULL, preexec_fn=close) == (0, [])


def test_a_log_at_the_limit_of_a_files_size_ends_nothing(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    with open(tmp_path / "log", "w") as log:
        code, [said] = end(tmp_path, MANY, stdout=log, preexec_fn=limit)
    assert code == 0 and "File too large" in said and (tmp_path / "log").stat().st_size == 4096


def test_a_mistake_keeps_its_exit_code_where_nothing_can_be_printed(tmp_path):
    with open("/dev/full", "w") as full:
        assert end(tmp_path, code=2, stdout=full, stderr=full) == (2, [])


def test_a_stream_that_another_program_made_non_blocking_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    sent, received = b"x" * (1 << 20), []

    def read() -> None:
        while chunk := os.read(reader, 1 << 16):
            received.append(chunk)

    thread = threading.Thread(target=read)
    stream, rest = LossyFile(writer), memoryview(sent)
    thread.start()
    while rest:
        rest = rest[stream.write(rest) :]
    os.close(writer)
    thread.join()
    os.close(reader)
    assert b"".join(received) == sent and stream.failure is None
