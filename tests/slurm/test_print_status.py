"""bash reads from a status file what training has written into it."""

import os
import subprocess
import sys
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


def test_a_run_that_wrote_nothing_prints_nothing(tmp_path):
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        done = subprocess.run([sys.executable, PRINT, tmp_path / name], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
