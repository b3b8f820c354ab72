"""job.sh as a batch job, as far as that can be tested without Slurm; test_slurm.py has the real one."""

import os
import subprocess

import pytest

from fake_job import CPU_PRECISION, FakeJob, run, status, write_executable


@pytest.fixture
def job(tmp_path) -> FakeJob:
    return FakeJob(tmp_path)


def test_a_heterogeneous_job_is_refused(job):
    done, calls = job(SLURM_JOB_ID=7, SLURM_HET_SIZE=2)
    assert done.returncode == 2 and "heterogeneous" in done.stderr and not calls


@pytest.fixture
def restart(job, tmp_path):
    """Starts job 7 for the nth time under a Slurm that only pretends; `srun` is what the training does."""

    def start(number: int, srun: str, script: str = "job.sh", **changes: object) -> subprocess.CompletedProcess:
        tools = tmp_path / "tools"
        for name, lines in {"srun": srun, "scontrol": 'echo "$*" >>"$JOB_LOG.requeues"', "sleep": "exit 0"}.items():
            write_executable(tools / name, f"#!/usr/bin/env bash\n{lines}\n")
        # As Slurm's own process, a batch script's parent, is named.
        batch = tmp_path / "batch.sh"
        batch.write_text("""exec -a 'slurmstepd: [7.batch]' bash -c 'bash "$0"; exit $?' "$@"\n""")
        changes = {
            "SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": number, "ACCELERATE_USE_CPU": "true",
            "PATH": f"{tools}:{os.environ['PATH']}", **changes,
        }  # fmt: skip
        return run("bash", batch, job.repository / script, env=job.environment(**changes), cwd=tmp_path)

    return start


def stops_after(step: int) -> str:
    """A training that Slurm's signal stops."""
    written = f"echo '{status('stopped', step=step)}' >\"$TEXT_TO_IMAGE_STATUS\""
    return f'trap "" USR1; kill -USR1 "$PPID"; {written}; exit 75'


def test_three_restarts_without_progress_end_the_job(restart, tmp_path):
    for number in range(4):
        done = restart(number, stops_after(5))
        requeued = f"requeued as restart {number + 1} of job 7, after step 5 of 9" in done.stdout
        assert requeued is (number < 3), done.stdout + done.stderr
        assert number == 0 or "before: after step 5 of 9" in done.stdout
    assert done.returncode == 1 and "three restarts in a row ended after step 5 of 9" in done.stderr
    assert (tmp_path / "job.log.requeues").read_text().count("requeue 7\n") == 3


def test_the_script_in_text_to_image_is_a_batch_job_too(restart):
    assert "requeued as restart 1 of job 7, after step 5" in restart(0, stops_after(5), "text_to_image/job.sh").stdout


def test_steps_are_progress(restart):
    for number in range(4):
        done = restart(number, stops_after(number + 1))
        assert f"requeued as restart {number + 1}" in done.stdout, done.stdout + done.stderr


def test_new_files_are_progress_whatever_the_step(restart, job):
    (made := job.repository / "output" / "run").mkdir(parents=True)
    for number in range(4):
        done = restart(number, f'touch "{made}/{number}"; {stops_after(5)}')
        assert f"requeued as restart {number + 1}" in done.stdout, done.stdout + done.stderr


def test_a_signal_in_another_script_is_said_to_be_there(restart):
    done = restart(0, 'kill -USR1 "$PPID"; sleep 5; exit 1')  # before the first step: no status
    assert "requeued as restart 1 of job 7, in train_text_to_image.py" in done.stdout


def test_a_job_that_is_done_forgets_its_restarts(restart, job):
    state = job.repository / "output" / ".job_7"
    restart(0, stops_after(5))
    assert state.exists()
    done = restart(1, f"echo '{status()}' >\"$TEXT_TO_IMAGE_STATUS\"")
    assert done.returncode == 0 and "== done in" in done.stdout and not state.exists(), done.stderr


def test_processes_that_trained_each_by_itself_fail_the_job(restart):
    done = restart(0, f"echo '{status(processes=2)}' >\"$TEXT_TO_IMAGE_STATUS\"")
    assert done.returncode == 1 and "== done" not in done.stdout and "1 processes" in done.stderr


def test_a_task_of_an_array_has_its_seed_its_folders_and_its_own_number(restart, job, tmp_path):
    srun = f'echo "$*" >>"$JOB_LOG.srun"; echo \'{status()}\' >"$TEXT_TO_IMAGE_STATUS"'
    array = {"SLURM_ARRAY_JOB_ID": 5, "SLURM_ARRAY_TASK_ID": 2}
    done = restart(0, srun, OUTPUT_DIR="the run", **array)
    assert done.returncode == 0, done.stderr
    flags = " ".join(["--output_dir the run-2", *CPU_PRECISION, "--seed 2"])
    assert flags in (tmp_path / "job.log.srun").read_text()
    assert f"{job.repository}/Generated_sample/task-2" in job.log.read_text()
    restart(0, stops_after(5), **array)
    assert (tmp_path / "job.log.requeues").read_text().splitlines()[-1] == "requeue 5_2"
