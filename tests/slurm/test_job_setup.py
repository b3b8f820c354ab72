"""job.sh setup: a Python is found, pip installs once, and whatever is missing is named in a line."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from clone import make_clone
from fake_job import FAKE_PYTHON, FakeJob, FakeMachine, environment, run, write_executable
from tiny_model import make_tiny_model


@pytest.fixture
def machine(tmp_path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_set_up_says_size_and_time_before_it_downloads_and_happens_once(machine):
    machine.install_pythons("python3.12")
    first = machine.set_up()
    assert (first.returncode, first.stderr) == (0, "")
    assert "6 GB" in first.stdout and "2 minutes" in first.stdout
    second = machine.set_up()
    assert (second.returncode, second.stdout, machine.installs()) == (0, "", 1)


def test_changed_requirements_are_installed(machine):
    machine.install_pythons("python3.11")
    machine.set_up()
    (machine.repository / "requirements.txt").write_text("something else")
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2


def test_a_killed_set_up_begins_again(machine):
    machine.install_pythons("python3.13")
    job = subprocess.Popen(
        ["bash", machine.repository / "job.sh", "setup"],
        env=machine.environment(FAKE_PIP_SECONDS=60),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while not machine.installs():
        assert job.poll() is None
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    (machine.venv / "half a package").touch()
    again = machine.set_up()
    assert again.returncode == 0 and "interrupted" in again.stdout
    assert not (machine.venv / "half a package").exists()
    assert machine.set_up().stdout == ""


def test_pip_failing_is_one_line_and_not_taken_for_done(machine):
    machine.install_pythons("python3")
    failed = machine.set_up(FAKE_PIP_FAILS=1)
    assert failed.returncode == 1 and "requirements.txt" in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2


def test_an_environment_that_somebody_made_is_completed_and_not_cleared(machine):
    machine.install_pythons("python3.12")
    write_executable(machine.venv / "bin" / "python", FAKE_PYTHON)
    (machine.venv / "has_pip").touch()
    (machine.venv / "mine").touch()
    assert machine.set_up().returncode == 0
    assert (machine.venv / "mine").exists() and "-m venv" not in machine.log()


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock two set-ups do not wait for each other")
def test_two_jobs_set_up_once(machine):
    machine.install_pythons("python3.12")
    command = ["bash", machine.repository / "job.sh", "setup"]
    jobs = [
        subprocess.Popen(command, env=machine.environment(FAKE_PIP_SECONDS=0.5), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and machine.installs() == 1
    assert sum("waiting" in text for text in said) == 1


def test_no_python_says_what_to_install(machine):
    missing = machine.set_up()
    assert missing.returncode == 2
    assert "found: none" in missing.stderr and "apt-get install" in missing.stderr and "module load" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_a_python_that_is_too_old_is_named(machine):
    machine.install_pythons("python3")
    old = machine.set_up(FAKE_VERSION="3.9")
    assert old.returncode == 2 and "python3 (3.9)" in old.stderr and machine.installs() == 0


def test_a_python_without_venv_says_which_package_is_missing(machine):
    machine.install_pythons("python3.11")
    bare = machine.set_up(FAKE_VERSION="3.11", FAKE_VENV_MISSING=1)
    assert bare.returncode == 2 and "python3.11-venv" in bare.stderr and machine.installs() == 0


def test_an_environment_that_is_none_is_refused(machine):
    wrong = run("bash", machine.repository / "job.sh", env=environment(VENV="/nowhere"))
    assert wrong.returncode == 2 and "VENV=/nowhere" in wrong.stderr


def test_where_no_environment_can_be_made_venv_is_named(machine):
    machine.install_pythons("python3.12")
    (machine.repository / ".venv").touch()
    done = machine.set_up()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "VENV=FOLDER" in done.stderr and len(done.stderr.splitlines()) == 1


def test_modules_need_a_machine_that_has_them(tmp_path):
    job = FakeJob(tmp_path)
    done, calls = job(MODULES="python/3.11")
    assert done.returncode == 2 and "MODULES=python/3.11" in done.stderr and not calls
    done, calls = job(MODULES="python/3.11", **{"BASH_FUNC_module%%": '() { echo "loaded $*"; }'})
    assert done.returncode == 0 and "loaded load python/3.11" in done.stdout


GO_OFFLINE = """
say() { echo "$*"; }
for part in choices hub; do source "$0/text_to_image/slurm/$part.sh"; done
repo="$0" outputs="$0/output"
go_offline
echo "offline ${HF_HUB_OFFLINE-no}"
"""


@pytest.mark.slow
def test_set_up_fetches_what_a_job_names_and_such_a_job_asks_no_hub(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 48)).save(tmp_path / "data" / "1.jpg")
    named = {"VENV": sys.prefix, "MODEL": make_tiny_model(tmp_path / "tiny"), "DATASET": tmp_path / "data"}
    done = run("bash", clone / "job.sh", "setup", env=environment(**named, CAPTIONER=""))
    assert done.returncode == 0 and "1 pictures in" in done.stdout, done.stderr
    for changed, offline in (
        ({}, "1"),
        ({"MODEL": "some/other"}, "no"),
        ({"TRAIN_ARGS": "--epochs 3"}, "1"),
        ({"TRAIN_ARGS": "--revision=main"}, "no"),
        ({"TRAIN_ARGS": "--variant fp16"}, "no"),
        ({"TRAIN_ARGS": "--push_to_hub"}, "no"),
    ):
        asked = environment(**{**named, **changed})
        asked.pop("HF_HUB_OFFLINE", None)
        said = run("bash", "-c", GO_OFFLINE, clone, env=asked).stdout
        assert said.splitlines()[-1] == f"offline {offline}"
        assert ("was not fetched" in said) is ("MODEL" in changed)
    done = run("bash", clone / "job.sh", "setup", env=environment(**{**named, "DATASET": "/no/such"}))
    assert done.returncode == 2 and "/no/such" in done.stderr, done.stderr
