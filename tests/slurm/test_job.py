"""job.sh: its choices and steps with scripts that only record, and once for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clone import ROOT, changes, make_clone
from fake_job import CPU_PRECISION, FakeJob, environment, make_dataset, run, status, write_executable
from tiny_model import make_tiny_model


@pytest.fixture
def job(tmp_path) -> FakeJob:
    return FakeJob(tmp_path)


# --- choices --------------------------------------------------------------------------------------------------------


def test_without_choices_the_data_set_of_the_repository_is_used(job):
    done, calls = job()
    assert done.returncode == 0, done.stderr
    dataset = str(job.repository / "dataset")
    assert list(calls) == ["img_captioning", "train_text_to_image", "inference"]
    assert calls["img_captioning"] == ["--image_dir", dataset]
    assert calls["train_text_to_image"] == ["--dataset", dataset, *CPU_PRECISION]
    assert calls["inference"] == ["--model", "/runs/my model", "--num_images", "3", "--resume"]


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
        "--output_dir", "the run", *CPU_PRECISION, "--seed", "1", "--validation_prompts", "a b", "$HOME",
    ]  # fmt: skip
    assert calls["inference"] == [
        "--model", "/runs/my model", "--num_images", "2", "--resume", "--prompt=a dress with $HOME and 'quotes'",
        "--steps", "5",
    ]  # fmt: skip


def test_several_folders_are_captioned_one_by_one_and_trained_on_together(job, tmp_path):
    for name in ("one", "my other", "a:b"):
        make_dataset(tmp_path / name, "A red dress laid flat.")
    done, calls = job(DATASET="one:~/my other:some/dataset", HOME=tmp_path, CAPTION_ARGS="--recursive")
    assert done.returncode == 0, done.stderr
    captioned = [call[1:] for call in map(json.loads, job.log.read_text().splitlines()) if call[0] == "img_captioning"]
    assert captioned == [["--image_dir", name, "--recursive"] for name in ("one", f"{tmp_path}/my other")]
    flags = ["--dataset", "one", "--dataset", f"{tmp_path}/my other", "--dataset", "some/dataset"]
    assert calls["train_text_to_image"][:6] == flags
    assert job(DATASET="a:b")[1]["train_text_to_image"][:2] == ["--dataset", "a:b"]  # one folder of this name
    assert job(DATASET="a\nb:one")[1]["train_text_to_image"][:4] == ["--dataset", "a\nb", "--dataset", "one"]


@pytest.mark.parametrize("value", [":one", "one:", "one::two", ":"])
def test_an_empty_name_among_several_folders_is_refused(job, value):
    done, calls = job(DATASET=value)
    assert done.returncode == 2 and f"DATASET={value}" in done.stderr and not calls


def test_a_home_folder_in_quotes_is_found(job, tmp_path):
    (tmp_path / "home").mkdir()
    shutil.copytree(job.repository / "dataset", tmp_path / "home" / "my data")
    shutil.copytree(tmp_path / "venv", tmp_path / "home" / "venv")
    done, calls = job(
        HOME=tmp_path / "home", MODEL="~/sd15", CAPTIONER="~/blip", DATASET="~/my data", OUTPUT_DIR="~", VENV="~/venv",
        PROMPT="~/is a word",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    home = str(tmp_path / "home")
    assert calls["img_captioning"] == ["--image_dir", f"{home}/my data", "--model", f"{home}/blip"]
    assert calls["train_text_to_image"][1::2] == [f"{home}/my data", f"{home}/sd15", home, *CPU_PRECISION[1:]]
    assert calls["inference"][-1] == "--prompt=~/is a word"


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
        ({"CAPTION_ARGS": "--output=elsewhere"}, "METADATA_FILE"),
        ({"CAPTION_ARGS": "--existing replace"}, "by hand"),
        ({"CAPTION_ARGS": "--recursive --existing=replace"}, "by hand"),
        ({"TRAIN_ARGS": "--no_such_flag"}, "--no_such_flag"),
        ({"TRAIN_ARGS": "--metadata_file captions.jsonl"}, "METADATA_FILE"),
        ({"TRAIN_ARGS": "--seed 1 --dataset=elsewhere"}, "DATASET"),
        ({"TRAIN_ARGS": "--validation_prompts 'a"}, "TRAIN_ARGS"),
        ({"INFERENCE_ARGS": "--step 30"}, "--step"),
        ({"NUM_IMAGES": "0"}, "--num_images"),
        ({"EPOCHS": "ten"}, "--epochs"),
    ],
)
def test_a_wrong_flag_is_found_before_anything_is_done(job, choices, named):
    done, calls = job(**choices)
    assert done.returncode == 2 and named in done.stderr and not calls
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_argument_is_refused(job):
    done, calls = job(arguments=["steup"])
    assert done.returncode == 2 and "'steup'" in done.stderr and not calls


def test_an_empty_word_at_the_end_of_the_flags_is_kept(job):
    assert job(INFERENCE_ARGS="--negative_prompt ''")[1]["inference"][-2:] == ["--negative_prompt", ""]


def test_names_that_job_sh_had_once_are_answered_with_the_names_now(job):
    for old in ({"model": "some/model"}, {"train_dir": "some/folder"}):
        said = job(**old)[0].stdout.splitlines()[0]
        assert "MODEL" in said and "DATASET" in said
    assert "train_dir" not in job(train_dir="x", model="y", MODEL="some/model", DATASET="some/dataset")[0].stdout


def test_a_missing_tmpdir_is_replaced_and_safe_path_does_no_harm(job):
    done, calls = job(TMPDIR="/no/such/folder", PYTHONSAFEPATH=1)
    assert done.returncode == 0 and len(calls) == 3, done.stderr
    line = next(line for line in done.stdout.splitlines() if "TMPDIR" in line)
    assert "/no/such/folder" in line and "/tmp" in line


@pytest.mark.parametrize(
    ("gpu", "on_cpu", "precision"), [("bf16", "", "bf16"), ("fp16", "", "fp16"), ("bf16", "true", "")]
)
def test_a_gpu_is_used_in_the_precision_it_has(job, gpu, on_cpu, precision):
    flags = job(FAKE_GPU=gpu, ACCELERATE_USE_CPU=on_cpu, TRAIN_ARGS="--mixed_precision no")[1]["train_text_to_image"]
    expected = ["--mixed_precision", precision] if precision else CPU_PRECISION
    assert flags[2:] == [*expected, "--mixed_precision", "no"]


# --- steps ----------------------------------------------------------------------------------------------------------


def test_the_last_lines_say_where_the_model_is_and_how_to_name_a_real_one(job):
    last = job()[0].stdout.split("== done")[1]
    for text in ("/runs/my model", "starter", "MODEL=stable-diffusion-v1-5/"):
        assert text in last
    own = job(DATASET="my pictures", PROMPT="x")[0].stdout.split("== done")[1]
    assert "starter" in own and r"DATASET=my\ pictures MODEL=stable" in own
    assert "starter" not in job(MODEL="some/model")[0].stdout
    assert "starter" not in job(TRAIN_ARGS="--pretrained_model_name_or_path some/model")[0].stdout


def test_a_dry_run_generates_nothing(job):
    done, calls = job(FAKE_STATUS=status("dry_run"))
    assert done.returncode == 0 and "inference" not in calls and "dry run" in done.stdout


def test_training_that_says_nothing_is_not_taken_for_finished(job):
    for said in ("", status("stopped")):
        done, calls = job(FAKE_STATUS=said)
        assert done.returncode == 1 and "inference" not in calls and "== done" not in done.stdout


def test_the_tasks_of_an_array_wait_for_the_one_that_captions(job):
    calls = job(SLURM_ARRAY_TASK_ID=0)[1]
    assert calls["img_captioning"] == ["--image_dir", str(job.repository / "dataset"), "--wait"]


def test_captions_can_be_had_alone_to_be_read_before_training(job):
    done, calls = job(arguments=["captions"])
    assert done.returncode == 0 and list(calls) == ["img_captioning"]
    assert f"{job.repository}/dataset/metadata.jsonl" in done.stdout
    done, calls = job(arguments=["captions"], DATASET="some/dataset")
    assert done.returncode == 2 and "DATASET=some/dataset" in done.stderr and not calls


def test_a_job_may_fill_rows_that_are_empty(job):
    assert job(CAPTION_ARGS="--existing fill --recursive")[1]["img_captioning"][2:] == [
        "--existing", "fill", "--recursive",
    ]  # fmt: skip


def test_captions_in_a_csv_file_are_where_they_are_to_be_read(job):
    rows = job.repository / "dataset" / "metadata.jsonl"
    rows.rename(rows.with_suffix(".csv"))
    assert f"{job.repository}/dataset/metadata.csv" in job(arguments=["captions"])[0].stdout


def test_what_is_captioned_is_what_training_takes(job, tmp_path):
    def captioned() -> list[str] | None:
        return job(DATASET="own data")[1].get("img_captioning")

    folder = tmp_path / "own data"
    (folder / "train").mkdir(parents=True)
    assert captioned() == ["--image_dir", "own data"]
    (folder / "train" / "0.parquet").touch()
    assert captioned() is None
    (folder / "train" / "metadata.csv").touch()
    assert captioned() == ["--image_dir", "own data/train"]
    (folder / "metadata.jsonl").touch()
    assert captioned() == ["--image_dir", "own data"]


def test_tar_shards_are_trained_on_by_their_pattern_and_not_captioned(job, tmp_path):
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"{number}.tar").touch()
    done, calls = job(DATASET="shards/{0..1}.tar:shards/*.tar")
    assert done.returncode == 0 and "img_captioning" not in calls, done.stderr
    assert calls["train_text_to_image"][:4] == ["--dataset", "shards/{0..1}.tar", "--dataset", "shards/*.tar"]
    done, calls = job(arguments=["captions"], DATASET="shards")
    assert done.returncode == 2 and "DATASET=shards" in done.stderr and not calls


def test_captions_can_be_in_a_file_of_their_own(job, tmp_path):
    (tmp_path / "own data" / "train").mkdir(parents=True)
    (tmp_path / "own data" / "train" / "metadata.jsonl").touch()  # not read
    done, calls = job(DATASET="own data", METADATA_FILE="~/my captions.jsonl", HOME=tmp_path)
    file = str(tmp_path / "my captions.jsonl")
    assert done.returncode == 0, done.stderr
    assert calls["img_captioning"] == ["--image_dir", "own data", "--output", file]
    assert calls["train_text_to_image"][-2:] == ["--metadata_file", file]
    done, _ = job(arguments=["captions"], DATASET="own data", METADATA_FILE=file)
    assert f"read the captions in {file}," in done.stdout


@pytest.mark.parametrize("name", ["图 片".encode(), b"caf\xe9\n"], ids=["unicode", "latin-1"])
def test_names_reach_captioning_byte_for_byte_in_any_locale(job, name):
    folder = os.path.join(os.fsencode(job.folder), name)
    os.mkdir(folder)
    done, calls = job(DATASET=os.fsdecode(folder), LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0 and os.fsencode(calls["img_captioning"][1]) == folder


def test_a_hub_data_set_needs_no_captioning(job):
    done, calls = job(DATASET="some/dataset")
    assert done.returncode == 0 and list(calls) == ["train_text_to_image", "inference"]


@pytest.mark.parametrize("script", ["img_captioning", "train_text_to_image", "inference"])
@pytest.mark.parametrize("code", [1, 2])
def test_a_script_that_stops_ends_the_job_with_its_code(job, script, code):
    done, calls = job(**{f"EXIT_{script}": code})
    assert done.returncode == code and list(calls)[-1] == script
    assert "== done" not in done.stdout


def test_a_log_that_nobody_reads_or_that_is_full_ends_nothing(job):
    reader, writer = os.pipe()
    os.close(reader)
    command, settings = ["bash", job.repository / "job.sh"], {"cwd": job.folder, "env": job.environment()}
    assert subprocess.run(command, stdout=writer, stderr=writer, **settings).returncode == 0
    os.close(writer)
    assert json.loads(job.log.read_text().splitlines()[-1])[0] == "inference"
    with open("/dev/full", "w") as full:
        assert subprocess.run([*command, "no_such_step"], stdout=full, stderr=full, **settings).returncode == 2


# --- where it lies and what runs it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["job.sh", "text_to_image/job.sh"])
@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix"])
def test_any_shell_goes_on_in_bash(job, tmp_path, name, shell):
    program, *options = shell.split()
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")
    write_executable(tmp_path / "a shell", f'#!/usr/bin/env bash\nexec {shell} "$@"\n')
    done, calls = job(job.repository / name, shell=tmp_path / "a shell")
    assert done.returncode == 0 and len(calls) == 3, done.stderr


def spool(job: FakeJob, name: str) -> Path:
    """A copy of a script as Slurm makes one."""
    (job.folder / "spool").mkdir()
    return shutil.copy(job.repository / name, job.folder / "spool" / "slurm_script")


@pytest.mark.parametrize(("name", "folder"), [("job.sh", "."), ("text_to_image/job.sh", "text_to_image")])
def test_under_slurm_the_repository_is_found_from_the_spool_folder(job, tmp_path, name, folder):
    spooled = spool(job, name)
    submitted_in = job.repository / folder
    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR=submitted_in)
    assert done.returncode == 0 and calls["img_captioning"][1] == str(job.repository / "dataset")

    # Submitted from elsewhere by its path: only Slurm knows the path.
    tools = tmp_path / "slurm"
    write_executable(
        tools / "scontrol", f"#!/usr/bin/env bash\necho JobId=7; echo '   Command={job.repository / name} captions'\n"
    )
    path = f"{tools}:{os.environ['PATH']}"
    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR="/", PATH=path)
    assert done.returncode == 0 and calls["img_captioning"][1] == str(job.repository / "dataset")

    done, calls = job(spooled, cwd=tmp_path / "spool", SLURM_JOB_ID=7, SLURM_SUBMIT_DIR="/")
    assert done.returncode == 2 and "job.sh" in done.stderr and not calls


def slurm_options(script: str) -> dict[str, str]:
    """The #SBATCH lines that Slurm finds: it stops reading at the first line that is neither comment nor blank."""
    options = {}
    for line in (ROOT / script).read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
    return options


def test_slurm_finds_the_same_options_in_both_folders():
    above, below = slurm_options("job.sh"), slurm_options("text_to_image/job.sh")
    assert above["gpus-per-node"] == "1" and above["signal"] == "B:USR1@300"
    assert above["open-mode"] == "append" and "requeue" in above
    assert (above.pop("output"), below.pop("output")) == ("text_to_image/job_%j.txt", "job_%j.txt")
    assert above == below


def test_job_sh_stays_short():
    assert len((ROOT / "job.sh").read_text().splitlines()) <= 200


def test_the_last_lines_name_the_pages_that_are_there(job, tmp_path):
    run_folder, pictures = tmp_path / "the run", tmp_path / "my pictures"
    for folder in (run_folder, pictures):
        folder.mkdir()
    choices = {"FAKE_STATUS": status(model=str(run_folder)), "PICTURES_DIR": pictures}
    done, _ = job(**choices)
    assert ".html" not in done.stdout
    (run_folder / "report.html").touch()
    (pictures / "index.html").touch()
    done, _ = job(**choices)
    result = done.stdout.split("== done")[1]
    assert f"{run_folder}/report.html\n" in result and f"{pictures}/index.html\n" in result


# --- once for real --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_leaves_pictures_and_a_clean_clone(tmp_path):
    clone = make_clone(tmp_path / "a clone")
    data = tmp_path / "my pictures"
    make_dataset(data, "a red t shirt on white", "denim jeans on white")
    for number in range(2):
        Image.new("RGB", (32, 48), (200, 40, 100 * number)).save(data / f"{number}.jpg")
    choices = environment(
        VENV=sys.prefix, MODEL=make_tiny_model(tmp_path / "tiny model"), DATASET=data, EPOCHS=2, NUM_IMAGES=1,
        TRAIN_ARGS="--train_batch_size 2", INFERENCE_ARGS="--steps 2",
    )  # fmt: skip
    done = run("bash", clone / "job.sh", cwd=tmp_path, env=choices)
    assert done.returncode == 0, done.stderr
    model = done.stdout.split("== done")[1].splitlines()[1].removeprefix("the model: ")
    assert (tmp_path / model / "model_index.json").exists()
    pictures = clone / "Generated_sample"
    assert f"{model}/report.html" in done.stdout and (tmp_path / model / "report.html").exists()
    assert (pictures / "contact_sheet.jpg").exists() and len(list(pictures.glob("*.png"))) == 3
    assert changes(clone) == ""


@pytest.mark.parametrize(
    ("choices", "variable"),
    [
        ({"OUTPUT_DIR": "a file/out"}, "OUTPUT_DIR"),
        ({"TRAIN_ARGS": "--output_dir 'a file/out'"}, "OUTPUT_DIR"),
        ({"PICTURES_DIR": "a file/pictures"}, "PICTURES_DIR"),
    ],
)
def test_a_folder_that_cannot_be_made_is_found_before_anything_is_done(job, choices, variable):
    (job.folder / "a file").touch()
    done, called = job(**choices)
    assert done.returncode == 2 and not called
    assert "a file/" in done.stderr and f"{variable}=FOLDER" in done.stderr


def test_pictures_go_where_they_are_asked_for(job):
    assert job(PICTURES_DIR="my pictures")[1]["inference"][-2:] == ["--output_dir", "my pictures"]


def test_results_of_a_repository_that_cannot_be_written_to_go_to_the_current_folder(job, tmp_path):
    shell = f'repo={tmp_path}/file; source "{job.repository}/text_to_image/slurm/choices.sh"; own_or_current output'
    (tmp_path / "file").touch(mode=0o444)
    done = run("bash", "-c", shell, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/output")
