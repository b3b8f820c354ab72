"""train_text_to_image.py as it is used: what it writes, that it learns, resumes and refuses bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from background import TRAIN, run_script
from captioned_folder import write_captioned_folder
from data.images import load_pixel_values
from models.loading import load_noise_scheduler, load_prompt_encoder, load_unet, load_vae
from plain_conditions import text_alone
from run_folder import losses, rows, weights
from runtime.errors import UserError
from tiny_model import make_tiny_model
from train_text_to_image import parse_args
from training.objective import Objective, diffusion_loss
from training.samples import Batch


@pytest.fixture
def run(train_run):
    return train_run


def same_weights(one: Path, other: Path, part: str = "unet", atol: float = 0.0) -> bool:
    left, right = weights(one, part), weights(other, part)
    return all(torch.allclose(left[name], right[name], rtol=0, atol=atol) for name in left)


# --- the script itself ----------------------------------------------------------------------------------------------


def test_the_script_says_what_it_will_do_does_it_and_the_result_generates(tiny_model, captioned_folder, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "training_defaults.json").write_text('{"learning_rate": 3e-4, "prior_images": 2, "use_ema": true}')
    flags = ["--pretrained_model_name_or_path", model, "--dataset", captioned_folder, "--epochs", 8]
    done = run_script(TRAIN, *flags, "--output_dir", tmp_path / "out", "--checkpointing_steps", 3)
    assert done.returncode == 0, done.stderr
    for said in (
        "3 in ",
        "56 x 72 px",
        "8 epochs",
        "cpu",
        "fp32",
        "learning_rate=0.0003",
        "epochs=8",
    ):
        assert said in done.stdout
    assert "s a step: about" in done.stdout and "inference.py" in done.stdout
    assert "loss=" in done.stderr and "images/s=" in done.stderr and "Traceback" not in done.stderr
    assert "float32" not in done.stderr  # the libraries' remarks about precision

    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] and record["steps"] == 6 and record["token_chunks"] == 3
    assert record["sizes"] == [{"height": 72, "width": 56, "pictures": 3}]
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    checkpoint = tmp_path / "out" / "checkpoint-6"
    assert all(UNet2DConditionModel.from_pretrained(checkpoint / part) for part in ("unet", "unet_ema"))
    assert same_weights(tmp_path / "out", checkpoint, "unet") is False  # what is saved is the average
    averaged = weights(checkpoint, "unet_ema")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in weights(tmp_path / "out").items())

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("denim jeans", num_inference_steps=2, height=72, width=56).images[0].size == (56, 72)


@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(run, tiny_model, captioned_folder, tmp_path):
    usual = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--prior_images", 3, "--use_ema"]
    alone = run("alone", *usual, "--train_batch_size", 4)
    flags = [TRAIN, "--pretrained_model_name_or_path", tiny_model, "--dataset", captioned_folder, *usual]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, *flags, "--train_batch_size", 2, "--output_dir", tmp_path / "two"]
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}  # a CPU alone needs no word
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | on_cpu
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "run.json").read_text())
    assert two["num_processes"] == 2
    assert two["fingerprint"] == json.loads((alone / "run.json").read_text())["fingerprint"]
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=1e-5)
    assert same_weights(tmp_path / "two", alone, atol=1e-4)


# --- learning -------------------------------------------------------------------------------------------------------


def fixed_loss(model: Path, unet: UNet2DConditionModel, folder: Path, captions: dict[str, str]) -> float:
    """The mean loss of pictures with captions on fixed noise and timesteps."""
    encoder, vae = load_prompt_encoder(model, 3), load_vae(model)
    noise_scheduler, total = load_noise_scheduler(model), 0.0
    with torch.no_grad():
        for name, caption in captions.items():
            pixels = load_pixel_values(folder / name, 72, 56)[None]
            latents = (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).repeat(16, 1, 1, 1)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            text = text_alone(encoder(caption).hidden_states.repeat(16, 1, 1))
            batch = Batch(latents, noise, noise, torch.linspace(200, 990, 16).long(), text)
            total += diffusion_loss(unet.eval(), Objective(noise_scheduler), batch).mean().item()
    return total / len(captions)


@pytest.fixture(scope="module")
def two_things(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    captions = {"1.png": "a red t-shirt", "2.png": "denim jeans"}
    return write_captioned_folder(tmp_path_factory.mktemp("two") / "things", captions), captions


@pytest.mark.slow
def test_training_lowers_the_loss_and_binds_each_caption_to_its_picture(run, two_things, tmp_path):
    """Fails with a learning rate of 0, with gradients that are not applied and with captions that are shuffled."""
    folder, captions = two_things
    base = make_tiny_model(tmp_path / "base", "v_prediction")
    swapped = dict(zip(captions, reversed(captions.values()), strict=True))
    flags = ["--max_train_steps", 300, "--learning_rate", 1e-2, "--caption_dropout", 0, "--seed", 0]
    out = run("learned", *flags, model=base, dataset=folder)
    before = fixed_loss(base, load_unet(base), folder, captions)
    after = fixed_loss(base, load_unet(out), folder, captions)
    wrong = fixed_loss(base, load_unet(out), folder, swapped)
    assert after < 0.3 * before
    assert after < 0.5 * wrong


@pytest.mark.usefixtures("few_sampling_steps")
def test_accumulated_batches_give_the_step_of_one_large_batch(run):
    """Also with 3 pictures and 4 parts, where a naive trainer takes a step with three quarters of the gradient."""
    usual = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--prior_images", 2]
    one = run("one", *usual, "--train_batch_size", 4)
    parts = run("parts", *usual, "--train_batch_size", 1, "--gradient_accumulation_steps", 4)
    assert losses(parts) == pytest.approx(losses(one), abs=1e-5)
    assert same_weights(parts, one, atol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(run):
    usual = ["--max_train_steps", 2, "--learning_rate", 1e-3, "--seed", 1]
    assert same_weights(run("kept", *usual), run("computed", *usual, "--gradient_checkpointing"), atol=1e-5)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_sampling_steps")
def test_a_resumed_run_ends_with_the_same_weights(run):
    usual = ["--learning_rate", 1e-3, "--lr_scheduler", "constant", "--use_ema", "--prior_images", 2]
    usual += ["--checkpointing_steps", 2, "--seed", 3]
    whole = run("whole", "--max_train_steps", 5, *usual)
    run("parts", "--max_train_steps", 3, *usual)
    assert len(rows(whole.parent / "parts")) == 3
    parts = run("parts", "--max_train_steps", 5, *usual)
    assert losses(parts) == losses(whole)
    assert same_weights(parts, whole)
    assert same_weights(parts / "checkpoint-4", whole / "checkpoint-4", "unet_ema")


def test_the_same_command_again_says_that_it_is_finished(run, capsys):
    run("out", "--max_train_steps", 2)
    before = (run("out", "--max_train_steps", 2) / "run.json").stat().st_mtime_ns
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[0].startswith("finished ") and said[1].startswith("the model ") and said[1].endswith("out")
    assert (run("out", "--max_train_steps", 1) / "run.json").stat().st_mtime_ns == before


def test_another_run_is_not_begun_in_a_folder_that_holds_one(run):
    run("out", "--max_train_steps", 1)
    with pytest.raises(UserError, match="another run"):
        run("out", "--max_train_steps", 1, "--learning_rate", 1e-4)


def test_more_steps_of_a_finished_run_without_checkpoint_are_refused(run):
    run("out", "--max_train_steps", 1)
    with pytest.raises(UserError, match="no checkpoint"):
        run("out", "--max_train_steps", 2)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dataset", "nowhere"], "nowhere"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--resolution", "0"], "--resolution"),
        (["--train_batch_size", "-1"], "--train_batch_size"),
        (["--mixed_precision", "fp8"], "--mixed_precision"),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
        (["--resume_from_checkpoint", "checkpoint-9"], "checkpoint-9"),
        (["--pretrained_model_name_or_path", "nobody/nothing"], "nobody/nothing"),
        (["--prior_prompts", "a shirt"], "--prior_images"),
    ],
)
def test_a_wrong_flag_is_refused_by_name_and_nothing_is_written(run, tmp_path, flags, named, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=named):
        run("out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_needed():
    with pytest.raises(UserError, match="--dataset"):
        parse_args([])


@pytest.mark.parametrize("missing", ["metadata.jsonl", "11 (2).JPG"])
def test_a_data_set_that_lacks_a_file_is_refused_by_its_name(run, tmp_path, missing):
    folder = write_captioned_folder(tmp_path / "data")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.replace("(", r"\(").replace(")", r"\)")):
        run("out", dataset=folder)


def test_a_truncated_picture_ends_the_script_with_2_and_one_message(tiny_model, tmp_path):
    folder = write_captioned_folder(tmp_path / "data")
    picture = folder / "11 (3).JPG"
    picture.write_bytes(picture.read_bytes()[:-300])
    done = run_script(TRAIN, "--dataset", folder, "--pretrained_model_name_or_path", tiny_model)
    assert done.returncode == 2
    assert "line 3: 11 (3).JPG" in done.stderr and "Traceback" not in done.stderr


def test_pictures_without_a_row_are_named(run, tmp_path, capsys):
    folder = write_captioned_folder(tmp_path / "data")
    shutil.copy(folder / "11 (1).JPG", folder / "nobody knows.JPG")
    run("out", "--max_train_steps", 1, dataset=folder)
    assert "nobody knows.JPG" in capsys.readouterr().out


def test_captions_that_are_cut_are_named(run, capsys):
    run("out", "--max_train_steps", 1, "--max_token_chunks", 1)
    assert "CUT at 75 tokens: 11 (3).JPG" in capsys.readouterr().out


@pytest.mark.usefixtures("few_sampling_steps")
def test_prompts_and_held_out_captions_that_are_cut_are_named(run, capsys, tmp_path):
    folder = write_captioned_folder(tmp_path / "held out")
    given = ["--prior_images", 2, "--prior_prompts", "a shirt", "--validation_dir", folder]
    run("out", *given, "--validation_prompts", "blue " * 80, "a cap", "--max_token_chunks", 1, "--dry_run")
    said = capsys.readouterr().out
    assert said.count("CUT at 75 tokens: --validation_prompts 'blue blue") == 1 and "--prior_prompts" not in said
    assert "CUT at 75 tokens: garments/11 (3).JPG, held out/11 (3).JPG (held out)" in said


@pytest.mark.parametrize("other", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_asks_for_an_unsupported_plugin_is_refused(train_run, monkeypatch, other):
    monkeypatch.setenv(f"ACCELERATE_USE_{other}", "true")
    with pytest.raises(UserError, match=other):
        train_run("out", "--max_train_steps", 1)
