"""job.sh: its set-up with pythons that only pretend, its choices with scripts that only record, and once for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from clone import ROOT, changes, make_clone
from tiny_model import make_tiny_model

TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "env", "find", "flock", "mkdir", "rm", "sleep", "touch"]
STEERING = ("MODEL", "CAPTIONER", "DATASET", "EPOCHS", "OUTPUT_DIR", "PROMPT", "NUM_IMAGES", "VENV",
            "CAPTION_ARGS", "TRAIN_ARGS", "INFERENCE_ARGS", "ACCELERATE_USE_CPU", "VIRTUAL_ENV", "CONDA_PREFIX",
            "MODULES", "TORCH_INDEX_URL")  # fmt: skip

FAKE_PYTHON = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$PYTHON_LOG"
case "$*" in
    '-c import sys; print'*) echo "$FAKE_VERSION" ;;
    '-c import venv'*) exit "${FAKE_VENV_MISSING:-0}" ;;
    '--version') echo "Python $FAKE_VERSION.0" ;;
    '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/has_pip" ;;
    '-m pip --version') [[ -e "${0%/bin/python}/has_pip" ]] ;;
    '-m pip install'*) sleep "${FAKE_PIP_SECONDS:-0}"; exit "${FAKE_PIP_FAILS:-0}" ;;
esac
"""

RECORDING_SCRIPT = """import json, os, sys
from pathlib import Path
from runtime.flags import FlagParser, positive_int

def build_parser():
    parser = FlagParser("script [flags]", "", "")
    for flag in ("--num_images", "--epochs"):
        parser.add_argument(flag, type=positive_int)
    parser.add_argument("--resume", action="store_true")
    for flag in ("--recursive", "--wait"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--image_dir", "--model", "--output_dir", "--pretrained_model_name_or_path", "--prompt"):
        parser.add_argument(flag)
    for flag in ("--dataset", "--mixed_precision", "--negative_prompt", "--seed", "--steps", "--validation_prompts"):
        parser.add_argument(flag, nargs="+")
    return parser

def parse_args(argv):
    return build_parser().parse_args(argv)

if __name__ == "__main__":
    with open(os.environ["JOB_LOG"], "a") as log:
        print(json.dumps([Path(sys.argv[0]).stem, *sys.argv[1:]]), file=log)
    print(os.environ.get("SAYS_" + Path(sys.argv[0]).stem, "").replace("|", chr(10)))
    sys.exit(int(os.environ.get("EXIT_" + Path(sys.argv[0]).stem, 0)))
"""


def outside(**environment: object) -> dict[str, str]:
    """The environment without what would steer job.sh, and with `environment`."""
    kept = {name: value for name, value in os.environ.items() if name not in STEERING and not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}


def bash(*command: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, command)], capture_output=True, text=True, **settings)


@pytest.fixture
def repository(tmp_path):
    """A copy with a space in its path, whose three scripts record how they were called."""
    folder = tmp_path / "my repository"
    (folder / "text_to_image").mkdir(parents=True)
    for name in ("job.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("devices.py", "errors.py", "flags.py"):
        shutil.copy(ROOT / "text_to_image" / name, folder / "text_to_image")
    for name in ("img_captioning", "train_text_to_image", "inference"):
        (folder / "text_to_image" / f"{name}.py").write_text(RECORDING_SCRIPT)
    make_dataset(folder / "dataset", "A pair of jeans. It is blue.", "A pair of jeans. It is black.")
    return folder


def make_dataset(folder: Path, *captions: str) -> None:
    folder.mkdir()
    rows = [{"file_name": f"{number}.jpg", "text": caption} for number, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        (folder / row["file_name"]).write_text("a picture")


# --- set-up: pythons that only pretend ------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, repository):
    """Calls job.sh on a machine that has a few tools and the pythons that `pythons` installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    log = tmp_path / "python.log"
    log.touch()

    class Machine:
        venv = repository / ".venv"

        def pythons(self, *names: str) -> None:
            for name in names:
                (tools / name).write_text(FAKE_PYTHON)
                (tools / name).chmod(0o755)

        def environment(self, **environment: object) -> dict[str, str]:
            return outside(PATH=tools, PYTHON_LOG=log, **{"FAKE_VERSION": "3.12", **environment})

        def set_up(self, **environment: object) -> subprocess.CompletedProcess:
            return bash(repository / "job.sh", "setup", env=self.environment(**environment))

        def installs(self) -> int:
            return log.read_text().count("-m pip install")

        def log(self) -> str:
            return log.read_text()

    return Machine()


def test_set_up_says_size_and_time_before_it_downloads_and_happens_once(machine):
    machine.pythons("python3.12")
    first = machine.set_up()
    assert (first.returncode, first.stderr) == (0, "")
    assert "6 GB" in first.stdout and "2 minutes" in first.stdout
    second = machine.set_up()
    assert (second.returncode, second.stdout, machine.installs()) == (0, "", 1)


def test_changed_requirements_are_installed(machine, repository):
    machine.pythons("python3.11")
    machine.set_up()
    (repository / "requirements.txt").write_text("something else")
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2


def test_a_killed_set_up_begins_again(machine):
    machine.pythons("python3.13")
    job = subprocess.Popen(
        ["bash", machine.venv.parent / "job.sh", "setup"],
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
    machine.pythons("python3")
    failed = machine.set_up(FAKE_PIP_FAILS=1)
    assert failed.returncode == 1 and "pip could not install requirements.txt" in failed.stderr
    assert machine.set_up().returncode == 0
    assert machine.installs() == 2


def test_an_environment_that_somebody_made_is_completed_and_not_cleared(machine):
    machine.pythons("python3.12")
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").write_text(FAKE_PYTHON)
    (machine.venv / "bin" / "python").chmod(0o755)
    (machine.venv / "has_pip").touch()
    (machine.venv / "mine").touch()
    assert machine.set_up().returncode == 0
    assert (machine.venv / "mine").exists() and "-m venv" not in machine.log()


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock two set-ups do not wait for each other")
def test_two_jobs_set_up_once(machine):
    machine.pythons("python3.12")
    command = ["bash", machine.venv.parent / "job.sh", "setup"]
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
    machine.pythons("python3")
    old = machine.set_up(FAKE_VERSION="3.9")
    assert old.returncode == 2 and "python3 (3.9)" in old.stderr and machine.installs() == 0


def test_a_python_without_venv_says_which_package_is_missing(machine):
    machine.pythons("python3.11")
    bare = machine.set_up(FAKE_VERSION="3.11", FAKE_VENV_MISSING=1)
    assert bare.returncode == 2 and "python3.11-venv" in bare.stderr and machine.installs() == 0


def test_an_environment_that_is_none_is_refused(repository):
    wrong = bash(repository / "job.sh", env=outside(VENV="/nowhere"))
    assert wrong.returncode == 2 and "VENV=/nowhere" in wrong.stderr


def test_an_unknown_argument_is_refused(repository):
    wrong = bash(repository / "job.sh", "steup", env=outside())
    assert wrong.returncode == 2 and "'steup'" in wrong.stderr


# --- choices: scripts that only record ------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, repository):
    """Runs job.sh with a python of its own and a torch that only has a GPU when told; returns result and calls."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "torch.py").write_text(
        "import os, types\n"
        "def __getattr__(name):\n"  # the types that devices.py names
        "    return type(name, (), {})\n"
        "def device(kind):\n"
        "    return types.SimpleNamespace(type=kind)\n"
        "class cuda:\n"
        "    is_available = staticmethod(lambda: 'FAKE_GPU' in os.environ)\n"
        "    is_bf16_supported = staticmethod(lambda including_emulation: os.environ['FAKE_GPU'] == 'bf16')\n"
    )
    log = tmp_path / "job.log"

    def run(script: Path | None = None, cwd: Path = tmp_path, arguments: tuple[str, ...] = (), **environment: object):
        log.write_text("")
        settings = {
            "VENV": tmp_path / "venv",
            "PYTHONPATH": tmp_path / "fakes",
            "JOB_LOG": log,
            "SAYS_train_text_to_image": "the model     /runs/my model|draw with it  python inference.py",
            "SAYS_inference": "drawing|6 pictures in /pictures, all of them in /pictures/contact_sheet.jpg",
            **environment,
        }
        done = bash(script or repository / "job.sh", *arguments, cwd=cwd, env=outside(**settings))
        return done, {name: flags for name, *flags in map(json.loads, log.read_text().splitlines())}

    return run


def test_without_choices_the_data_set_of_the_repository_is_used(job, repository):
    done, calls = job()
    assert done.returncode == 0, done.stderr
    dataset = str(repository / "dataset")
    assert list(calls) == ["img_captioning", "train_text_to_image", "inference"]
    assert calls["img_captioning"] == ["--image_dir", dataset]
    assert calls["train_text_to_image"] == ["--dataset", dataset, "--epochs", "100"]
    assert calls["inference"] == [
        "--model", "/runs/my model", "--num_images", "3", "--resume",
    ]  # fmt: skip


def test_the_last_lines_say_where_everything_is_and_how_to_name_a_real_model(job):
    last = job()[0].stdout.split("== done")[1]
    for text in ("/pictures/contact_sheet.jpg", "/runs/my model", "starter", "MODEL=stable-diffusion-v1-5/"):
        assert text in last
    own = job(DATASET="my pictures", PROMPT="x")[0].stdout.split("== done")[1]
    assert "starter" in own and r"DATASET=my\ pictures MODEL=stable" in own
    assert "starter" not in job(MODEL="some/model")[0].stdout


def test_the_model_of_a_run_that_was_finished_before_is_drawn_with(job):
    said = "finished      after 300 steps|the model     /runs/my own|draw with it  python inference.py"
    assert job(SAYS_train_text_to_image=said)[1]["inference"][:2] == ["--model", "/runs/my own"]


def test_choices_come_from_the_environment(job, tmp_path):
    make_dataset(tmp_path / "own data", "A red dress laid flat. Its hem is torn.")
    done, calls = job(
        MODEL="some/model", CAPTIONER="some/captioner", DATASET="own data", EPOCHS=7, OUTPUT_DIR="the run",
        PROMPT="a dress with $HOME and 'quotes'", NUM_IMAGES=2, TRAIN_ARGS="--seed 1 --validation_prompts 'a b' $HOME",
        INFERENCE_ARGS="--steps 5", CAPTION_ARGS="--recursive",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert calls["img_captioning"] == ["--image_dir", "own data", "--model", "some/captioner", "--recursive"]
    assert calls["train_text_to_image"] == [
        "--dataset", "own data", "--epochs", "7", "--pretrained_model_name_or_path", "some/model",
        "--output_dir", "the run", "--seed", "1", "--validation_prompts", "a b", "$HOME",
    ]  # fmt: skip
    assert calls["inference"] == [
        "--model", "/runs/my model", "--num_images", "2", "--resume", "--prompt=a dress with $HOME and 'quotes'",
        "--steps", "5",
    ]  # fmt: skip


def test_a_real_model_gets_a_real_captioner_unless_one_is_named(job):
    def captioner(**choices: str) -> list[str]:
        return job(**choices)[1]["img_captioning"][2:]

    assert captioner(MODEL="some/model") == ["--model", "Salesforce/blip-image-captioning-large"]
    assert captioner(MODEL="some/model", CAPTIONER="some/captioner") == ["--model", "some/captioner"]
    assert captioner(MODEL="some/model", CAPTIONER="") == captioner() == []


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"CAPTION_ARGS": "--recursiv"}, "--recursiv"),
        ({"CAPTION_ARGS": "--model some/captioner"}, "CAPTIONER"),
        ({"CAPTION_ARGS": "--output=elsewhere"}, "DATASET"),
        ({"CAPTION_ARGS": "--existing replace"}, "by hand"),
        ({"TRAIN_ARGS": "--no_such_flag"}, "--no_such_flag"),
        ({"INFERENCE_ARGS": "--step 30"}, "--step"),
        ({"NUM_IMAGES": "0"}, "--num_images"),
        ({"EPOCHS": "ten"}, "--epochs"),
    ],
)
def test_a_wrong_flag_is_found_before_anything_is_done(job, choices, named):
    done, calls = job(**choices)
    assert done.returncode == 2 and named in done.stderr and not calls
    assert len(done.stderr.splitlines()) == 1


def test_an_empty_word_at_the_end_of_the_flags_is_kept(job):
    assert job(INFERENCE_ARGS="--negative_prompt ''")[1]["inference"][-2:] == ["--negative_prompt", ""]


def test_a_dry_run_draws_nothing(job):
    done, calls = job(SAYS_train_text_to_image="dry run       100 steps would take 1 min")
    assert done.returncode == 0 and "inference" not in calls and "dry run" in done.stdout


def test_the_tasks_of_an_array_wait_for_the_one_that_captions(job, repository):
    calls = job(SLURM_ARRAY_TASK_ID=0)[1]
    assert calls["img_captioning"] == ["--image_dir", str(repository / "dataset"), "--wait"]


def test_captions_can_be_had_alone_to_be_read_before_training(job, repository):
    done, calls = job(arguments=["captions"])
    assert done.returncode == 0 and list(calls) == ["img_captioning"]
    assert f"read the captions in {repository}/dataset/metadata.jsonl" in done.stdout
    done, calls = job(arguments=["captions"], DATASET="some/dataset")
    assert done.returncode == 2 and "DATASET=some/dataset: no folder of pictures" in done.stderr and not calls


def test_what_is_captioned_is_what_training_takes(job, tmp_path):
    def captioned() -> list[str] | None:
        return job(DATASET="own data")[1].get("img_captioning")

    folder = tmp_path / "own data"
    (folder / "train").mkdir(parents=True)
    assert captioned() == ["--image_dir", "own data"]
    (folder / "train" / "0.parquet").touch()
    assert captioned() is None
    (folder / "train" / "metadata.jsonl").touch()
    assert captioned() == ["--image_dir", "own data/train"]
    (folder / "metadata.jsonl").touch()
    assert captioned() == ["--image_dir", "own data"]


def test_a_hub_data_set_needs_no_captioning(job):
    done, calls = job(DATASET="some/dataset")
    assert done.returncode == 0 and list(calls) == ["train_text_to_image", "inference"]


@pytest.mark.parametrize(
    ("gpu", "on_cpu", "precision"), [("bf16", "", "bf16"), ("fp16", "", "fp16"), ("bf16", "true", "")]
)
def test_a_gpu_is_used_in_the_precision_it_has(job, gpu, on_cpu, precision):
    flags = job(FAKE_GPU=gpu, ACCELERATE_USE_CPU=on_cpu, TRAIN_ARGS="--mixed_precision no")[1]["train_text_to_image"]
    expected = ["--mixed_precision", precision] if precision else []
    assert flags[4:] == [*expected, "--mixed_precision", "no"]


@pytest.mark.parametrize("script", ["img_captioning", "train_text_to_image", "inference"])
@pytest.mark.parametrize("code", [1, 2])
def test_a_script_that_stops_ends_the_job_with_its_code(job, script, code):
    done, calls = job(**{f"EXIT_{script}": code})
    assert done.returncode == code and list(calls)[-1] == script
    assert "== done" not in done.stdout


def test_a_quote_without_its_partner_is_refused(job):
    done, calls = job(TRAIN_ARGS="--validation_prompts 'a")
    assert done.returncode == 2 and "TRAIN_ARGS" in done.stderr and not calls


def test_under_slurm_the_repository_is_found_from_the_spool_folder(job, repository, tmp_path):
    (tmp_path / "spool").mkdir()
    spooled = shutil.copy(repository / "job.sh", tmp_path / "spool" / "slurm_script")
    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=repository)
    assert done.returncode == 0 and calls["img_captioning"][1] == str(repository / "dataset")

    # Submitted from elsewhere by its path: only Slurm knows the path.
    (tmp_path / "slurm").mkdir()
    scontrol = tmp_path / "slurm" / "scontrol"
    scontrol.write_text(f"#!/usr/bin/env bash\necho 'JobId=7'; echo '   Command={repository}/job.sh'\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path / 'slurm'}:{os.environ['PATH']}"
    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR="/", PATH=path)
    assert done.returncode == 0 and calls["img_captioning"][1] == str(repository / "dataset")

    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR="/")
    assert done.returncode == 2 and "job.sh" in done.stderr and not calls


def test_slurm_finds_its_settings():
    lines = (ROOT / "job.sh").read_text().splitlines()
    settings = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    # Slurm stops reading at the first line that is neither comment nor blank.
    assert all(line.startswith("#") for line in lines[: 1 + len(settings)])
    wanted = {"gpus-per-node=1", "output=text_to_image/job_%j.txt", "open-mode=append", "requeue", "signal=B:USR1@300"}
    assert wanted <= set(settings)


# --- once for real --------------------------------------------------------------------------------------------------


def test_a_job_leaves_pictures_and_a_clean_clone(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    data = tmp_path / "my pictures"
    make_dataset(data, "a red t shirt on white", "denim jeans on white")
    for number in range(2):
        Image.new("RGB", (32, 48), (200, 40, 100 * number)).save(data / f"{number}.jpg")
    environment = outside(
        VENV=sys.prefix, MODEL=make_tiny_model(tmp_path / "tiny model"), DATASET=data, EPOCHS=2, NUM_IMAGES=1,
        TRAIN_ARGS="--train_batch_size 2", INFERENCE_ARGS="--steps 2",
    )  # fmt: skip
    done = bash(clone / "job.sh", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    pictures, model = done.stdout.split("== done")[1].splitlines()[1:3]
    sheet = clone / "Generated_sample" / "contact_sheet.jpg"
    assert (
        "a clone/Generated_sample/contact_sheet.jpg" in pictures
        and sheet.exists()
        and len(list(sheet.parent.glob("*.png"))) == 3
    )
    assert (tmp_path / model.removeprefix("the model: ") / "model_index.json").exists()
    assert changes(clone) == ""


def test_set_up_fetches_what_a_job_names_and_such_a_job_asks_no_hub(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 48)).save(tmp_path / "data" / "1.jpg")
    named = {"VENV": sys.prefix, "MODEL": make_tiny_model(tmp_path / "tiny"), "DATASET": tmp_path / "data"}
    named["CAPTIONER"] = ""
    done = bash(clone / "job.sh", "setup", env=outside(**named))
    assert done.returncode == 0 and "1 pictures in" in done.stdout, done.stderr
    below = tmp_path / "data" / "below"
    below.mkdir()
    Image.new("RGB", (32, 48)).save(below / "2.jpg")
    for name in ("1.txt", "below/2.txt"):  # with these no captioner is to be fetched
        (tmp_path / "data" / name).write_text("grey")
    done = bash(clone / "job.sh", "setup", env=outside(**named, CAPTION_ARGS="--recursive") | {"CAPTIONER": "no/such"})
    assert done.returncode == 0 and "2 pictures in" in done.stdout, done.stderr
    script = 'source <(sed "/^main /d" "$0"); repo="$1"; go_offline; echo "offline ${HF_HUB_OFFLINE-no}"'
    for changed, offline in (
        ({}, "1"),
        ({"MODEL": "some/other"}, "no"),
        ({"TRAIN_ARGS": "--epochs 3"}, "1"),
        ({"TRAIN_ARGS": "--revision=main"}, "no"),
        ({"TRAIN_ARGS": "--variant fp16"}, "no"),
        ({"TRAIN_ARGS": "--push_to_hub"}, "no"),
    ):
        said = bash("-c", script, clone / "job.sh", clone, env=outside(**{**named, **changed})).stdout
        assert said.splitlines()[-1] == f"offline {offline}"
        assert ("was not fetched" in said) is ("MODEL" in changed)
    for wrong in ({"DATASET": "/no/such"}, {"MODEL": "some/other"}, {"TRAIN_ARGS": "--no_such_flag"}):
        done = bash(clone / "job.sh", "setup", env=outside(HF_HUB_OFFLINE=1, **{**named, **wrong}))
        assert done.returncode == 2 and str(*wrong.values()) in done.stderr, done.stderr


# --- under Slurm, as far as it can be told without one; test_slurm.py has the real thing ------------------------


def test_a_heterogeneous_job_is_refused(job):
    done, calls = job(SLURM_JOB_ID=7, SLURM_HET_SIZE=2)
    assert done.returncode == 2 and "heterogeneous" in done.stderr and not calls


def test_modules_need_a_machine_that_has_them(job):
    done, calls = job(MODULES="python/3.11")
    assert done.returncode == 2 and "MODULES=python/3.11" in done.stderr and not calls
    done, calls = job(MODULES="python/3.11", **{"BASH_FUNC_module%%": '() { echo "loaded $*"; }'})
    assert done.returncode == 0 and "loaded load python/3.11" in done.stdout


@pytest.fixture
def restart(job, repository, tmp_path):
    """Starts job 7 for the nth time under a Slurm that only pretends; `srun` is what the training does."""

    def run(number: int, srun: str) -> subprocess.CompletedProcess:
        (tools := tmp_path / "tools").mkdir(exist_ok=True)
        for name, lines in {"srun": srun, "scontrol": 'echo "$*" >>"$JOB_LOG.requeues"', "sleep": "exit 0"}.items():
            (tools / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
            (tools / name).chmod(0o755)
        # As Slurm's own process, a batch script's parent, is named.
        batch = tmp_path / "batch.sh"
        batch.write_text("""exec -a 'slurmstepd: [7.batch]' bash -c 'bash "$0"; exit $?' "$@"\n""")
        environment = outside(
            SLURM_JOB_ID=7, SLURM_RESTART_COUNT=number, ACCELERATE_USE_CPU="true", VENV=tmp_path / "venv",
            PATH=f"{tools}:{os.environ['PATH']}", PYTHONPATH=tmp_path / "fakes", JOB_LOG=tmp_path / "job.log",
        )  # fmt: skip
        return bash(batch, repository / "job.sh", env=environment, cwd=tmp_path)

    return run


STOPS = 'trap "" USR1; kill -USR1 "$PPID"; echo "SIGUSR1: stopped after step 5 of 9, saved"; exit 75'


def test_three_restarts_without_progress_end_the_job(restart, tmp_path):
    for number in range(4):
        done = restart(number, STOPS)
        requeued = f"requeued as restart {number + 1} of job 7, after step 5 of 9" in done.stdout
        assert requeued is (number < 3), done.stdout + done.stderr
    assert done.returncode == 1 and "three restarts in a row ended after step 5 of 9" in done.stderr
    assert (tmp_path / "job.log.requeues").read_text().count("requeue 7\n") == 3


def test_restarts_that_leave_new_files_are_progress_whatever_the_step(restart, repository, tmp_path):
    (made := repository / "output" / "run").mkdir(parents=True)
    for number in range(5):
        done = restart(number, f'touch "{made}/{number}"; {STOPS}')
        assert f"requeued as restart {number + 1}" in done.stdout, done.stdout + done.stderr
