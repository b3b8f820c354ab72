"""A training run writes how far it came, where the program that started it asks for that."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from run_folder import rows
from runs.status import STATUS_VARIABLE, write_status
from runtime.errors import Stopped
from runtime.stopping import StopSignals

MAIN = SimpleNamespace(is_main_process=True, num_processes=2)


@pytest.fixture
def status_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "status.json"))
    return tmp_path / "status.json"


def test_the_main_process_writes_it(status_file, tmp_path):
    write_status(SimpleNamespace(is_main_process=False, num_processes=2), "finished", tmp_path, 9, 9)
    assert not status_file.exists()
    write_status(MAIN, "stopped", tmp_path / "run", 3, 9)
    expected = {"model": str(tmp_path / "run"), "num_processes": 2, "step": 3, "steps": 9, "state": "stopped"}
    assert json.loads(status_file.read_text()) == expected


def test_nothing_is_written_where_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    write_status(MAIN, "finished", tmp_path, 9, 9)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "none" / "status.json"))
    write_status(MAIN, "finished", tmp_path, 9, 9)
    assert f"{STATUS_VARIABLE}=" in (warning := capsys.readouterr().err) and "status.json" in warning


def test_training_says_dry_run_stopped_and_finished(train_run, status_file, tmp_path):
    def status() -> tuple[str, str, int, int, int]:
        told = json.loads(status_file.read_text())
        status_file.unlink()
        return told["state"], told["model"], told["step"], told["steps"], told["num_processes"]

    class StopAtStep2(StopSignals):
        """A signal in the second step, when the first one's row is written."""

        @property
        def asked(self):
            metrics = tmp_path / "run" / "metrics.jsonl"
            return "SIGUSR1" if metrics.exists() and rows(tmp_path / "run") else None

        @asked.setter
        def asked(self, name):
            pass

    folder = str(tmp_path / "run")
    flags = ["--max_train_steps", 3, "--train_batch_size", 1]
    train_run("run", *flags, "--dry_run")
    assert status() == ("dry_run", folder, 0, 3, 1)
    with pytest.raises(Stopped):
        train_run("run", *flags, stop=StopAtStep2())
    assert status() == ("stopped", folder, 2, 3, 1)
    train_run("run", *flags)
    assert status() == ("finished", folder, 3, 3, 1)
    train_run("run", *flags)  # finished before
    assert status() == ("finished", folder, 3, 3, 1)
