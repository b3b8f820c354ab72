"""tests/gpu/run.sh with tiny models on the CPU: it must not be broken on the day there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.rows import FAILED, OK, SKIPPED, Measurement, Report, Skipped

HERE = Path(__file__).parent
GROUPS = {"machine", "first", "speed", "correctness", "memory", "diffusers", "generation", "starter", "xl"}
NEEDS_NO_GPU = {"first", "speed", "correctness", "generation", "starter", "xl"}


@pytest.mark.slow
def test_every_group_has_rows_and_none_fails(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", HERE / "run.sh", tmp_path, "--tiny"]
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


def test_a_row_whose_process_dies_is_seen(tmp_path):
    class Dead(BaseException):
        """Nothing that a row catches."""

    def die() -> dict:
        raise Dead

    report = Report(tmp_path)
    with pytest.raises(Dead):
        report.measure("speed", Measurement("dies", die), float("inf"))
    assert Report(tmp_path).running().name == "dies"
