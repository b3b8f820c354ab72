"""What train_text_to_image.py can do beyond a plain run, end to end on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from captioned_folder import write_captioned_folder
from generation.generate import generate
from inference import parse_args as inference_args
from run_folder import losses, rows, weights
from runtime.errors import UserError
from tiny_model import make_tiny_model
from train_text_to_image import parse_args


@pytest.fixture
def run(train_run):
    return train_run


STEPS = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--seed", 0]


# --- what is trained ------------------------------------------------------------------------------------------------


def test_the_rate_and_the_gradients_norm_are_those_asked_for(run, monkeypatch):
    norms = []
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda a, p, norm: norms.append(norm) or clip(a, p, norm))
    flags = ["--scale_lr", "--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant"]
    flags += ["--max_train_steps", 1, "--checkpointing_steps", 1, "--max_grad_norm", 0.5]
    out = run("out", "--learning_rate", 1e-4, *flags)
    optimizer = torch.load(out / "checkpoint-1" / "training_state.pt", weights_only=True)["optimizer"]
    assert rows(out)[0]["lr"] == optimizer["param_groups"][0]["lr"] == pytest.approx(4e-4)
    assert norms == [0.5]


def test_a_lora_run_resumes_to_the_same_file_and_inference_generates_with_it(run, tmp_path):
    usual = ["--lora_rank", 2, "--learning_rate", 1e-2, "--lr_scheduler", "constant", "--checkpointing_steps", 2]
    whole = run("whole", *usual, "--max_train_steps", 4)
    run("parts", *usual, "--max_train_steps", 2)
    parts = run("parts", *usual, "--max_train_steps", 4)
    one, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name or ".up." in name)
    assert (whole / "checkpoint-4" / "pytorch_lora_weights.safetensors").exists()
    assert not (whole / "unet").exists()
    args = ["--prompt", "denim jeans", "--steps", "2", "--num_images", "1", "--output_dir", str(tmp_path / "images")]
    for model in (whole, json.loads((whole / "run.json").read_text())["base_model"]):
        generate(inference_args([*args, "--model", str(model), "--height", "72", "--width", "56"]))
    one, other = (Image.open(path).tobytes() for path in (tmp_path / "images").glob("*.png"))
    assert one != other


def test_the_unet_of_another_revision_is_what_is_trained(run, tiny_model, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(other / "unet", dtype=torch.float32)
    with torch.no_grad():
        unet.conv_out.bias += 1
    unet.save_pretrained(other / "unet")
    monkeypatch.setattr("training.plan.find_bases", lambda args: (tiny_model, other))
    out = run("out", "--max_train_steps", 1, "--learning_rate", 1e-8)
    assert torch.allclose(weights(out)["conv_out.bias"], unet.conv_out.bias, atol=1e-6)


@pytest.mark.slow
def test_a_bf16_copy_learns_as_fp32_does_and_is_saved_in_fp32(run, tmp_path):
    base = make_tiny_model(tmp_path / "base", "v_prediction")
    usual = ["--max_train_steps", 60, "--learning_rate", 3e-3, "--seed", 0, "--use_ema", "--validation_steps", 30]
    full = run("full", *usual, model=base)
    half = run("half", *usual, "--mixed_precision", "bf16", model=base)
    last = [rows(folder)[-1] for folder in (full, half)]
    for name in ("train_fixed_loss", "train_fixed_loss_ema"):
        assert last[1][name] == pytest.approx(last[0][name], rel=0.02)
        assert last[1][name] < 0.95 * rows(half)[29][name]
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())
    assert losses(half) != losses(full)


def test_the_result_of_a_bf16_copy_is_its_fp32_average(run):
    out = run("out", *STEPS, "--mixed_precision", "bf16", "--use_ema", "--checkpointing_steps", 3)
    averaged = weights(out / "checkpoint-3", "unet_ema")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in weights(out).items())


def test_an_offloaded_average_is_the_same(run):
    plain, offloaded = (
        weights(run(f"out{len(more)}", *STEPS, "--use_ema", *more)) for more in ([], ["--offload_ema"])
    )
    assert all(torch.equal(tensor, offloaded[name]) for name, tensor in plain.items())


def test_a_timestep_bias_changes_what_is_trained_on_and_1_is_no_bias(run):
    plain, none, biased = (
        run(f"out{number}", *STEPS, *flags)
        for number, flags in enumerate(([], ["--timestep_bias_multiplier", 1], ["--timestep_bias_multiplier", 1000]))
    )
    assert losses(plain) == losses(none) != losses(biased)
    one, other = (json.loads((out / "run.json").read_text())["fingerprint"] for out in (plain, none))
    assert one == other


def test_a_schedule_that_ends_in_pure_noise_is_trained_and_sampled_from_its_end(run):
    out = run("out", *STEPS, "--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", 5)
    assert all(loss < 100 for loss in losses(out))
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert not pipeline.scheduler.config.get("clip_sample")  # latents go far beyond 1
    pipeline.set_progress_bar_config(disable=True)
    assert len(set(pipeline("denim jeans", num_inference_steps=3, height=64, width=64).images[0].tobytes())) > 10


def test_dream_sees_the_unets_own_error(run):
    plain, dreamt = run("plain", *STEPS), run("dreamt", *STEPS, "--dream_training")
    assert losses(dreamt) != losses(plain) and all(loss < 100 for loss in losses(dreamt))


# --- data -----------------------------------------------------------------------------------------------------------


def mixed_folder(folder: Path) -> Path:
    """Pictures of three shapes; one caption tells of writing."""
    captions = {
        "portrait.jpg": "denim jeans with a black square in the upper right corner",
        "landscape.jpg": "a red t-shirt, its pocket on the left",
        "square.jpg": "a white t-shirt with a logo on the left",
        "another.jpg": "the jeans flat",
    }
    write_captioned_folder(folder, captions)
    for name, size in {"landscape.jpg": (96, 64), "square.jpg": (64, 64), "another.jpg": (30, 40)}.items():
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((5, 5, size[0] // 2, size[1] - 9), fill="red")
        image.save(folder / name)
    return folder


def test_each_shape_has_its_bucket_and_the_table_says_what_is_done_with_each(run, tmp_path, capsys):
    folder = mixed_folder(tmp_path / "data")
    out = run("out", *STEPS, "--random_flip", dataset=folder)
    said = capsys.readouterr().out
    sizes = json.loads((out / "run.json").read_text())["sizes"]
    assert [size["pictures"] for size in sizes] == [2, 1, 1]
    assert "56 x 72 px: 2 pictures" in said and "64 x 64 px: 1 picture," in said
    assert "SMALLER and enlarged" in said and "another.jpg" in said
    assert "3 of 4 pictures are mirrored" in said and "square.jpg ('logo')" in said


def test_what_is_left_out_is_named_before_the_first_step(run, tmp_path, capsys):
    folder = mixed_folder(tmp_path / "data")
    (folder / "phone.HEIC").touch()
    (folder / "below").mkdir()
    shutil.copy(folder / "square.jpg", folder / "below")
    shutil.copy(folder / "square.jpg", folder / "below" / "no suffix")
    shutil.copy(folder / "square.jpg", folder / "square.mask.png")
    run("out", *STEPS, "--dry_run", dataset=folder)
    said = " ".join(capsys.readouterr().out.split())
    assert "WITHOUT A CAPTION, left out: below/square.jpg" in said
    assert "NOT READABLE, left out: below/no suffix, phone.HEIC (save them as JPEG or PNG)" in said


def test_captions_of_sub_folders_are_trained_on_and_what_contradicts_a_row_is_named(run, tmp_path, capsys):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "a shirt"})
    for name in ("dogs", "held out"):
        write_captioned_folder(folder / name, {"2.jpg": "a dog", "3.jpg": "another dog"})
    (folder / "dogs" / "3.jpg").rename(folder / "dogs" / "3.JPG")
    (folder / "dogs" / "metadata.jsonl").write_text('{"file_name": "2.jpg", "text": "a dog"}\n')
    (folder / "1.TXT").write_text("a red shirt")
    run("out", *STEPS, "--dry_run", "--validation_dir", folder / "held out", dataset=folder)
    said = " ".join(capsys.readouterr().out.split())
    assert f"pictures 2 in {folder}, and 2 held out" in said
    assert "sub-folders, too: dogs" in said and "WITHOUT A CAPTION, left out: dogs/3.JPG" in said
    assert "TEXT FILES that differ from the row of their picture, which counts: 1.TXT" in said


@pytest.mark.usefixtures("few_sampling_steps")
def test_words_that_would_stand_for_your_pictures_and_for_the_bases_own_are_named(run, capsys):
    usual = [*STEPS, "--prior_images", 2, "--dry_run"]
    for name, flags, both in (("a", [], 1), ("b", ["--trigger", "sks"], 0), ("c", ["--prior_prompts", "a shirt"], 0)):
        run(name, *usual, *flags)
        assert capsys.readouterr().out.count("THE SAME WORDS") == both


def test_a_lora_learns_faster_than_a_whole_unet_unless_a_flag_or_the_model_says_how_fast(tiny_model, tmp_path):
    lora = ["--dataset", "x", "--lora_rank", "2", "--pretrained_model_name_or_path"]
    assert parse_args([*lora, str(tiny_model)]).learning_rate == 1e-4
    assert parse_args([*lora, str(tiny_model), "--learning_rate", "1e-5"]).learning_rate == 1e-5
    (tmp_path / "training_defaults.json").write_text('{"learning_rate": 3e-4, "use_ema": true}')
    args = parse_args([*lora, str(tmp_path)])
    assert (args.learning_rate, args.use_ema) == (3e-4, False)


def test_the_old_square_crop_is_there(run, tmp_path, capsys):
    out = run("out", *STEPS, "--center_crop", dataset=mixed_folder(tmp_path / "data"))
    assert json.loads((out / "run.json").read_text())["sizes"] == [{"height": 64, "width": 64, "pictures": 4}]


@pytest.mark.usefixtures("few_sampling_steps")
def test_buckets_and_accumulation_give_the_step_of_one_batch(run, tmp_path):
    folder = mixed_folder(tmp_path / "data")
    usual = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--prior_images", 2, "--random_flip"]
    one = run("one", *usual, "--train_batch_size", 4, dataset=folder)
    parts = run("parts", *usual, "--train_batch_size", 1, "--gradient_accumulation_steps", 4, dataset=folder)
    assert losses(parts) == pytest.approx(losses(one), abs=1e-5)
    assert all(torch.allclose(weights(one)[name], weights(parts)[name], atol=1e-4) for name in weights(one))


@pytest.mark.parametrize("amount", ["-0.1", "0.6", "nan"])
def test_a_random_affine_beyond_what_is_possible_is_refused(amount):
    with pytest.raises(UserError, match="--random_affine"):
        parse_args(["--random_affine", amount])


def test_encoding_live_trains_as_stored_encodings_do_in_all_augmentations(run, capsys):
    usual = [*STEPS, "--random_flip", "--random_affine", 0.1]
    stored, live = run("stored", *usual), run("live", *usual, "--no_cache")
    said = capsys.readouterr().out
    assert "16 variants" in said and "10%" in said and "1.4°" in said
    [shard] = (stored / "cache" / "pictures").iterdir()
    assert len(load_file(shard)) % 32 == 0 and losses(run("unmoved", *STEPS, "--random_flip")) != losses(stored)
    assert losses(live) == pytest.approx(losses(stored), abs=1e-5)
    assert not (live / "cache").exists()


@pytest.mark.usefixtures("few_sampling_steps")
def test_another_number_of_the_bases_own_pictures_is_generated_anew_after_a_dry_run(run):
    run("out", *STEPS, "--prior_images", 2, "--dry_run", "--no_cache")
    run("out", *STEPS, "--prior_images", 3)
    assert len(list((run("out", *STEPS, "--prior_images", 3) / "cache" / "prior").iterdir())) == 2


def test_a_run_that_came_to_nothing_is_in_nobodys_way(run, monkeypatch):
    monkeypatch.setattr("training.train.encode_dataset", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("out", *STEPS)
    monkeypatch.undo()
    assert len(losses(run("out", *STEPS, "--learning_rate", 1e-4))) == 3


def test_a_cache_of_its_own_serves_two_runs(run, tmp_path):
    cache = tmp_path / "shared"
    run("one", *STEPS, "--latents_cache_dir", cache)
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    run("two", *STEPS, "--learning_rate", 1e-4, "--latents_cache_dir", cache)
    assert made and {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == made


def test_a_warm_start_reads_no_picture_and_loads_no_encoder(run, tmp_path, monkeypatch):
    monkeypatch.setattr("data.file_facts.SETTLED", -1.0)
    flags = [*STEPS, "--latents_cache_dir", tmp_path / "shared"]
    cold = run("cold", *flags)
    for name in ("data.dataset.read_image_size", "data.input_files.InputFile._read"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("a picture is read"))
    for name in ("load_vae", "load_prompt_encoder"):
        monkeypatch.setattr(f"training.encoding.{name}", lambda *_: pytest.fail("an encoder is loaded"))
    assert losses(run("warm", *flags)) == losses(cold)


def test_encodings_of_an_earlier_version_are_named_and_not_read(run, tmp_path, capsys):
    cache = tmp_path / "shared"
    (cache / "latents").mkdir(parents=True)
    run("out", *STEPS, "--latents_cache_dir", cache)
    assert f"{cache / 'latents'}: encodings of an earlier version" in capsys.readouterr().out


def test_the_trigger_stands_before_every_caption_once(run, captioned_folder):
    args = parse_args(["--dataset", str(captioned_folder), "--trigger", "sks jeans"])
    assert args.trigger == "sks jeans"
    out = run("out", *STEPS, "--trigger", "sks jeans")
    record = json.loads((out / "run.json").read_text())
    assert record["trigger"] == "sks jeans" and record["example_prompts"][:2] == [
        "sks jeans, denim jeans",
        "sks jeans, A single pair of denim jeans laid flat on a white background",
    ]


def test_fewer_pictures_can_be_trained_on_the_same_ones_every_time(run):
    first, second = (json.loads((run(n, *STEPS, "--max_train_samples", 2) / "run.json").read_text()) for n in "ab")
    assert sum(size["pictures"] for size in first["sizes"]) == 2
    assert first["dataset_hash"] == second["dataset_hash"]


def test_a_data_set_of_parquet_files_is_read_where_it_lies(run, tmp_path):
    import datasets

    folder = write_captioned_folder(tmp_path / "data")
    pictures = sorted(folder.glob("*.JPG"))
    table = datasets.Dataset.from_dict(
        {"picture": [str(path) for path in pictures], "says": ["denim jeans", "a red t-shirt", "the jeans"]}
    ).cast_column("picture", datasets.Image())
    (tmp_path / "tables").mkdir()
    table.to_parquet(tmp_path / "tables" / "train.parquet")
    flags = ["--image_column", "picture", "--caption_column", "says", "--cache_dir", tmp_path / "hub"]
    out = run("out", *STEPS, *flags, dataset=tmp_path / "tables")
    assert json.loads((out / "run.json").read_text())["sizes"][0]["pictures"] == 3
    with pytest.raises(UserError, match="--caption_column text: .*picture, says"):
        run("other", *STEPS, "--cache_dir", tmp_path / "hub", dataset=tmp_path / "tables")


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_sampling_steps")
def test_validation_changes_nothing_and_leaves_losses_and_pictures(run, captioned_folder, tmp_path):
    usual = ["--max_train_steps", 5, "--learning_rate", 1e-3, "--seed", 0, "--use_ema"]
    plain = run("plain", *usual)
    other = shutil.copytree(captioned_folder, tmp_path / "other")
    prompts = ["--validation_prompts", "denim jeans", "a red t-shirt", "--num_validation_images", 2]
    validated = run("validated", *usual, "--validation_dir", other, "--validation_steps", 2, *prompts)
    assert losses(validated) == losses(plain)
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(validated).items())
    measured = [row for row in rows(validated) if "val_loss" in row]
    assert [row["step"] for row in measured] == [2, 4, 5]
    assert {"val_loss_ema", "train_fixed_loss", "train_fixed_loss_ema"} <= measured[0].keys()
    pictures = sorted(path.name for path in (validated / "validation").iterdir())
    assert pictures == [f"step-00000{step}-{index}.png" for step in (0, 2, 4, 5) for index in range(4)]
    record = json.loads((validated / "run.json").read_text())
    assert record["best_step"] in (2, 4, 5)


def test_held_out_pictures_are_not_trained_on(run, tmp_path):
    folder = mixed_folder(tmp_path / "data")
    out = run("out", *STEPS, "--validation_split", 0.25, "--validation_steps", 3, dataset=folder)
    record = json.loads((out / "run.json").read_text())
    assert sum(size["pictures"] for size in record["sizes"]) == 3
    assert rows(out)[-1]["val_loss"] > 0 and record["best_step"] == 3


def test_the_best_checkpoint_is_not_pruned(run, tmp_path, monkeypatch):
    found = iter([0.5, 0.1, 0.5, 0.5])
    monkeypatch.setattr("training.validation.FixedNoiseLoss.measure", lambda self, *_: {"val_loss": next(found)})
    flags = ["--validation_steps", 1, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    out = run("out", "--max_train_steps", 4, *flags)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((out / "run.json").read_text())["best_step"] == 2


def test_the_best_of_the_checkpoints_is_not_pruned_where_a_step_between_was_better(run, monkeypatch):
    found = iter([0.5, 0.2, 0.1, 0.4, 0.5, 0.6])
    monkeypatch.setattr("training.validation.FixedNoiseLoss.measure", lambda self, *_: {"val_loss": next(found)})
    flags = ["--validation_steps", 1, "--checkpointing_steps", 2, "--checkpoints_total_limit", 1]
    out = run("out", "--max_train_steps", 6, *flags)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_a_dry_run_says_how_long_it_will_take_and_writes_only_the_cache(run, tmp_path, capsys):
    out = run("out", *STEPS, "--dry_run")
    assert "s a step: about" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["cache"]
    run("out", *STEPS)
    assert (out / "run.json").exists()
