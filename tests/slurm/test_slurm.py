"""job.sh under a real Slurm: its controller, two nodes of this machine, its signals, requeues and dead nodes."""

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from background import count_rows
from captioned_folder import write_captioned_folder
from clone import make_clone
from run_folder import losses, weights
from slurm_cluster import Cluster, cluster, what_is_missing
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slurm

STEPS = 60
# In fp32 (job.sh would take bf16 on some processors): runs on one and on two processes are compared.
TRAIN = f"--max_train_steps {STEPS} --checkpointing_steps 7 --learning_rate 1e-3 --seed 0 --mixed_precision no"


@pytest.fixture(scope="module")
def slurm():
    if missing := what_is_missing():
        assert not os.environ.get("SLURM_TESTS"), missing  # .ci/run installs it: there it may not be missing
        pytest.skip(missing)
    with cluster() as running:
        if running.proctrack != "proctrack/cgroup":
            warnings.warn(
                "proctrack/linuxproc: signals reach processes that they would not on most clusters", stacklevel=2
            )
        yield running


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("slurm") / "my repository")


@pytest.fixture(scope="module")
def settings(tmp_path_factory, repository) -> dict[str, str]:
    """The environment of a job on a tiny model: one step is a fraction of a second."""
    folder = tmp_path_factory.mktemp("slurm inputs")
    return {
        "VENV": sys.prefix, "MODEL": str(make_tiny_model(folder / "tiny")), "NUM_IMAGES": "1", "PROMPT": "denim jeans",
        "DATASET": str(write_captioned_folder(folder / "data")), "TRAIN_ARGS": f"{TRAIN} --train_batch_size 2",
        "INFERENCE_ARGS": "--steps 2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def submit(slurm: Cluster, repository, settings, tmp_path):
    """Submits job.sh from the repository's folder with OUTPUT_DIR in tmp_path; returns the job's number."""

    def send(*flags: object, cwd: Path = repository, script: object = "job.sh", **changes: str) -> str:
        environment = {**settings, "OUTPUT_DIR": str(tmp_path / "out"), **changes}
        return slurm.submit(*flags, script, cwd=cwd, **environment)

    return send


@pytest.fixture(scope="module")
def uncut(slurm: Cluster, repository, settings, tmp_path_factory) -> Path:
    """The output folder of a job that nothing happened to."""
    out = tmp_path_factory.mktemp("uncut") / "out"
    number = slurm.submit("job.sh", cwd=repository, **settings, OUTPUT_DIR=str(out))
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    return out


def log_of(repository: Path, number: str) -> str:
    return (repository / "text_to_image" / f"job_{number}.txt").read_text()


def wait_for_rows(slurm: Cluster, number: str, out: Path, rows: int) -> None:
    slurm.until(number, lambda job: count_rows(out) >= rows or job["JobState"] in ("FAILED", "COMPLETED"))


def rows_so_far(out: Path, count: int | None = None) -> bytes:
    """The first `count` rows of metrics.jsonl, or all; they hold timings, so no other start writes the same."""
    return b"".join((out / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:count])


def went_on(out: Path, before: bytes) -> bool:
    """Whether training has kept these rows and added to them; begun anew, it would have replaced them."""
    now = rows_so_far(out)
    return now.startswith(before) and len(now) > len(before)


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return all((left[name] == right[name]).all() for name in left)


def test_a_plain_job_trains_and_generates_and_its_log_can_be_read(submit, slurm, repository, tmp_path):
    number = submit()
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    log = log_of(repository, number)
    assert f"Slurm job {number}" in log and "== done in" in log and "train_text_to_image" in log.split("== done")[1]
    assert "\r" not in log and "Traceback" not in log
    assert len(losses(tmp_path / "out")) == STEPS
    assert list((repository / "Generated_sample").glob("denim-jeans-*.png"))


def test_from_another_directory_with_chdir(submit, slurm, repository, tmp_path):
    number = submit(f"--chdir={repository}", cwd=tmp_path, script=repository / "job.sh")
    assert slurm.ended(number)["JobState"] == "COMPLETED"
    assert "== done in" in log_of(repository, number)


def test_from_inside_text_to_image_with_a_signal(submit, slurm, repository, tmp_path):
    number = submit(cwd=repository / "text_to_image")
    wait_for_rows(slurm, number, tmp_path / "out", 3)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    job = slurm.ended(number)
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", log_of(repository, number)
    log = log_of(repository, number)
    assert f"requeued as restart 1 of job {number}, after step" in log and "== done in" in log


def test_a_signal_leads_to_a_checkpoint_a_requeue_and_the_same_weights(submit, slurm, repository, tmp_path, uncut):
    number, kept = submit(), []
    for restart in (1, 2):
        before = count_rows(tmp_path / "out")
        wait_for_rows(slurm, number, tmp_path / "out", before + 3)
        slurm.run("scancel", "--batch", "--signal=USR1", number)
        slurm.until(number, lambda job, restart=restart: job["Restarts"] == str(restart))
        kept.append(rows_so_far(tmp_path / "out"))
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    log = log_of(repository, number)
    assert f"requeued as restart 1 of job {number}, after step" in log
    assert f"restart 2 of job {number}; before: after step" in log
    assert "Traceback" not in log and all(went_on(tmp_path / "out", rows) for rows in kept)
    assert losses(tmp_path / "out") == losses(uncut) and same_weights(tmp_path / "out", uncut)


def test_a_real_time_limit_is_survived(submit, slurm, repository, tmp_path):
    """Slurm looks at limits every half minute, so the signal may come that much earlier than asked for."""
    endless = "--max_train_steps 100000 --checkpointing_steps 100000"
    number = submit("--time=60", "--signal=B:USR1@5", TRAIN_ARGS=endless)
    wait_for_rows(slurm, number, tmp_path / "out", 3)
    hours, minutes, seconds = map(int, slurm.job(number)["RunTime"].split(":"))
    limit = 60 * hours + minutes + (2 if seconds > 30 else 1)  # minutes, at least half a minute from now
    slurm.run("scontrol", "update", f"jobid={number}", f"timelimit={limit}")
    slurm.until(number, lambda job: job["Restarts"] == "1")
    slurm.run("scontrol", "update", f"jobid={number}", "timelimit=60")
    assert f"requeued as restart 1 of job {number}, after step" in log_of(repository, number)
    kept = rows_so_far(tmp_path / "out")
    wait_for_rows(slurm, number, tmp_path / "out", kept.count(b"\n") + 1)
    assert went_on(tmp_path / "out", kept)
    slurm.run("scancel", number)
    slurm.ended(number)


def test_a_preempted_job_saves_and_goes_on_when_there_is_room_again(submit, slurm, repository, tmp_path, uncut):
    """Slurm sends SIGTERM to the run, not to the batch shell, and requeues the job itself when the grace is over."""
    number = submit()
    wait_for_rows(slurm, number, tmp_path / "out", 10)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true", cwd=tmp_path)
    slurm.until(number, lambda job: job["Restarts"] == "1")
    kept = rows_so_far(tmp_path / "out")
    assert slurm.ended(urgent)["JobState"] == "COMPLETED"
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    assert "waiting for Slurm to end this job" in log_of(repository, number)
    assert went_on(tmp_path / "out", kept)
    assert losses(tmp_path / "out") == losses(uncut) and same_weights(tmp_path / "out", uncut)


def test_a_cancelled_job_is_not_requeued(submit, slurm, repository, tmp_path):
    number = submit()
    wait_for_rows(slurm, number, tmp_path / "out", 3)
    slurm.run("scancel", number)
    job = slurm.ended(number)
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0"
    assert "requeued" not in log_of(repository, number)


def test_a_node_that_dies_hands_the_job_to_the_other(submit, slurm, repository, tmp_path, uncut):
    number = submit()
    wait_for_rows(slurm, number, tmp_path / "out", 10)
    kept = rows_so_far(tmp_path / "out", 7)  # those before the checkpoint
    first = slurm.job(number)["NodeList"]
    slurm.run("scontrol", "update", f"nodename={first}", "state=down", "reason=test")
    slurm.run("scontrol", "update", f"nodename={first}", "state=drain", "reason=test")  # its slurmd lives
    try:
        job = slurm.ended(number)
    finally:
        slurm.revive(first)
    assert job["JobState"] == "COMPLETED" and job["NodeList"] != first and job["Restarts"] == "1"
    assert went_on(tmp_path / "out", kept)
    assert losses(tmp_path / "out") == losses(uncut) and same_weights(tmp_path / "out", uncut)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"DATASET": "/no/such/folder"}, "/no/such/folder"), ({"TRAIN_ARGS": "--no_such_flag"}, "--no_such_flag")],
)
def test_a_users_mistake_fails_at_once_and_is_not_requeued(submit, slurm, repository, changes, said):
    number = submit(**changes)
    job = slurm.ended(number)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0" and job["Restarts"] == "0"
    log = log_of(repository, number)
    assert said in log and "Traceback" not in log and "requeued" not in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be used")
def test_a_gpu_that_cannot_be_used_stops_the_job_with_the_reason(submit, slurm, repository):
    number = submit("--gpus-per-node=1", ACCELERATE_USE_CPU="")
    job = slurm.ended(number)
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "1:0"
    log = log_of(repository, number)
    assert "PyTorch cannot use it" in log and "TORCH_INDEX_URL" in log and "Traceback" not in log


def test_two_nodes_train_one_model(submit, slurm, repository, tmp_path, uncut):
    number = submit("--nodes=2", TRAIN_ARGS=f"{TRAIN} --train_batch_size 1")
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["num_processes"] == 2
    assert losses(tmp_path / "out") == pytest.approx(losses(uncut), abs=1e-4)


def test_a_signal_reaches_two_nodes(submit, slurm, repository, tmp_path):
    number = submit("--nodes=2")
    wait_for_rows(slurm, number, tmp_path / "out", 3)
    slurm.run("scancel", "--batch", "--signal=USR1", number)
    slurm.until(number, lambda job: job["Restarts"] == "1")
    assert slurm.ended(number)["JobState"] == "COMPLETED", log_of(repository, number)
    assert len(losses(tmp_path / "out")) == STEPS


def test_an_array_is_as_many_runs_with_seeds_and_folders_of_their_own(submit, slurm, repository, tmp_path):
    short = "--max_train_steps 60 --learning_rate 1e-3"
    array = submit("--array=0-1", TRAIN_ARGS=short)
    first, second = (f"{array}_{task}" for task in (0, 1))
    slurm.until(second, lambda job: job["JobState"] != "PENDING" and count_rows(tmp_path / "out-1") >= 1)
    slurm.run("scancel", "--batch", "--signal=USR1", second)  # the task whose own number is the array's
    slurm.until(second, lambda job: job["Restarts"] == "1")
    jobs = [slurm.ended(task) for task in (first, second)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 2, log_of(repository, jobs[1]["JobId"])
    assert [job["Restarts"] for job in jobs] == ["0", "1"]
    seeds = [json.loads((tmp_path / f"out-{task}" / "run.json").read_text())["seed"] for task in (0, 1)]
    assert seeds == [0, 1] and losses(tmp_path / "out-0") != losses(tmp_path / "out-1")
    for task in (0, 1):
        assert len(list((repository / "Generated_sample" / f"task-{task}").glob("*.png"))) == 1


def test_nothing_is_left_in_the_clone(slurm, repository, uncut):
    from clone import changes

    assert changes(repository) == ""
