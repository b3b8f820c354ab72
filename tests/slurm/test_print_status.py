"""bash reads from a status file what training has written into it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clone import ROOT
from runs.status import write_status

PRINT = ROOT / "text_to_image" / "slurm" / "print_status.py"


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_bash_reads_what_training_wrote(tmp_path, monkeypatch, locale):
    status = tmp_path / "status"
    monkeypatch.setenv("TEXT_TO_IMAGE_STATUS", str(status))
    model = tmp_path / "my 'run'\nof today, für 狗"
    write_status(SimpleNamespace(is_main_process=True, num_processes=4), "stopped", model, 3, 9)
    read = 'mapfile -td "" fields < <("$@"); printf "[%s]" "${fields[@]}"'
    command = ["bash", "-c", read, "bash", sys.executable, PRINT, status]
    printed = subprocess.run(command, capture_output=True, check=True, cwd="/", env={**os.environ, **locale}).stdout
    assert printed.decode() == f"[stopped][3][9][4][{model}]"


def make_status_file(tmpdir, outputs) -> subprocess.CompletedProcess:
    words = 'fail() { echo "$2" >&2; exit "$1"; }; source "$0"; outputs="$1"; cd "$1" && make_status_file'
    return subprocess.run(
        ["bash", "-c", words, ROOT / "text_to_image" / "slurm" / "choices.sh", outputs],
        env={**os.environ, "TMPDIR": str(tmpdir)}, capture_output=True, text=True,
    )  # fmt: skip


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_the_status_file_is_made_where_there_is_room(small_disk, tmp_path):
    (tmp_path / "outputs").mkdir()
    fill(small_disk)
    made = make_status_file(small_disk, tmp_path / "outputs")
    assert (made.returncode, Path(made.stdout).parent) == (0, tmp_path / "outputs"), made.stderr
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    made = make_status_file(small_disk, small_disk)
    assert made.returncode == 1 and "no room" in made.stderr


def test_a_disk_that_fills_up_meanwhile_does_not_lose_the_status(small_disk, monkeypatch):
    status = Path(make_status_file(small_disk, small_disk).stdout)
    fill(small_disk)
    monkeypatch.setenv("TEXT_TO_IMAGE_STATUS", str(status))
    for state in ("stopped before", "finished"):
        write_status(SimpleNamespace(is_main_process=True, num_processes=1), state, Path("/a"), 9, 9)
    printed = subprocess.run([sys.executable, PRINT, status], capture_output=True, text=True).stdout
    assert printed.split("\0")[:2] == ["finished", "9"]


def test_a_run_that_wrote_nothing_prints_nothing(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" " * 4096)
    for name in ("empty", "blank", "missing"):
        done = subprocess.run([sys.executable, PRINT, tmp_path / name], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
