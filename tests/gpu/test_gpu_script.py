"""tests/gpu/run.sh with tiny models on the CPU: it must not be broken on the day there is a GPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu import check_gpu
from gpu.rows import FAILED, OK, RUNNING, SKIPPED, Measurement, Report, Row, Skipped

HERE = Path(__file__).parent
GROUPS = {"machine", "first", "speed", "correctness", "memory", "diffusers", "generation", "starter", "xl"}
NEEDS_NO_GPU = {"first", "speed", "correctness", "generation", "starter", "xl"}


@pytest.mark.slow
def test_every_group_has_rows_and_none_fails(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", HERE / "run.sh", tmp_path, "--tiny", "--minutes", "60"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [row for row in rows if row["status"] not in (OK, SKIPPED)] == [], done.stderr
    assert done.returncode == 0, done.stderr
    assert {row["group"] for row in rows} == GROUPS
    assert {row["group"] for row in rows if row["status"] == OK} >= NEEDS_NO_GPU
    assert all(row["reason"] for row in rows if row["status"] == SKIPPED)
    assert all(row["measured"] for row in rows if row["status"] == OK)
    report = (tmp_path / "gpu.md").read_text()
    assert all(f"## {group}" in report for group in GROUPS - {"machine"}) and "- torch: " in report
    assert (tmp_path / "starter_sheet.jpg").is_file() and (tmp_path / "gpu.log").stat().st_size


def test_a_row_that_fails_is_recorded_with_its_traceback_and_the_next_one_is_measured(tmp_path):
    def fail() -> dict:
        raise RuntimeError("an illegal memory access")

    report, far = Report(tmp_path), float("inf")
    failed = report.measure("speed", Measurement("one", fail), far)
    assert failed.status == FAILED and "an illegal memory access" in failed.reason and "in fail" in failed.reason
    assert report.measure("speed", Measurement("two", lambda: {"images/s": 3}), far).status == OK
    assert [row.name for row in Report(tmp_path).rows] == ["one", "two"]
    assert "| two | ok |" in (tmp_path / "gpu.md").read_text()


def test_a_row_without_time_or_what_it_needs_says_why(tmp_path):
    def skip() -> dict:
        raise Skipped("needs a GPU")

    report = Report(tmp_path)
    late = report.measure("speed", Measurement("late", dict), deadline=0)
    skipped = report.measure("speed", Measurement("skipped", skip), deadline=float("inf"))
    assert late.status == skipped.status == SKIPPED
    assert "no time" in late.reason and skipped.reason == "needs a GPU"


def test_a_process_that_dies_costs_one_row_and_another_goes_on(tmp_path, monkeypatch):
    def run(args, groups, work, deadline):
        report = Report(tmp_path)
        first = not report.rows
        report.put(Row("speed", "batch 64" if first else "batch 16", RUNNING if first else OK))
        return -signal.SIGSEGV if first else 0

    monkeypatch.setattr(check_gpu, "run_process", run)
    check_gpu.start_groups(argparse.Namespace(out=tmp_path), ["speed"], tmp_path, time.time() + 60)
    died, measured = Report(tmp_path).rows
    assert died.status == FAILED and "exit code -11" in died.reason and measured.status == OK


def test_a_process_that_never_begins_is_not_started_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "run_process", lambda *words: 1)
    check_gpu.start_groups(argparse.Namespace(out=tmp_path), ["speed"], tmp_path, time.time() + 60)
    [row] = Report(tmp_path).rows
    assert (row.group, row.status) == ("speed", FAILED)


def test_groups_for_which_no_time_is_left_are_named(tmp_path):
    check_gpu.start_groups(argparse.Namespace(out=tmp_path), ["xl"], tmp_path, time.time())
    [row] = Report(tmp_path).rows
    assert (row.group, row.status) == ("xl", SKIPPED) and row.reason


def test_what_is_not_finite_is_beyond_every_limit():
    import torch

    from gpu.correctness import relative, within

    nan = relative(torch.tensor([float("nan"), 1.0]), torch.ones(2))
    assert not within((0.0, nan), (1.0, 1.0)) and max(0.1, nan) == max(nan, 0.1) == float("inf")


def test_a_row_whose_process_dies_is_seen(tmp_path):
    class Dead(BaseException):
        """Nothing that a row catches."""

    def die() -> dict:
        raise Dead

    report = Report(tmp_path)
    with pytest.raises(Dead):
        report.measure("speed", Measurement("dies", die), float("inf"))
    assert Report(tmp_path).running().name == "dies"
