"""Stable Diffusion XL through the training script: what its UNet is told in a step, and what comes of a run."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from data.augmentation import apply_augmentation
from data.images import load_pixel_values
from models.loading import load_unet, load_vae
from run_folder import assert_same_bits, losses, weights
from runtime.errors import UserError
from train_text_to_image import parse_args
from training.encoding import encode_dataset
from training.objective import diffusion_loss
from training.samples import DATA, HELD_OUT, PRIOR, SampleKey, make_sample
from training.setup import make_batches, prepare_run
from training.validation import fixed_samples_of

QUICK = ["--resolution", 32, "--max_token_chunks", 1, "--train_batch_size", 2]


@pytest.fixture(scope="module")
def landscape_and_portrait(tmp_path_factory):
    """Pictures of 96 x 62 and 40 x 100 px, which are cropped."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures") / "data"
    folder.mkdir()
    rows = []
    for name, size in (("a.png", (96, 62)), ("b.png", (40, 100))):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(0))).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"a denim {name[0]} laid flat on white"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def prepared(xl_model, landscape_and_portrait, tmp_path):
    def prepare(*flags: object):
        usual = ["--pretrained_model_name_or_path", xl_model, "--dataset", landscape_and_portrait,
                 "--output_dir", tmp_path / "out", *QUICK]  # fmt: skip
        run = prepare_run(parse_args([str(word) for word in [*usual, *flags]]))
        encodings = encode_dataset(run)
        return run, encodings, make_batches(run, encodings)

    return prepare


def crop_of(picture, size) -> list[float]:
    """In the order of diffusers' XL script: original size, the crop's corner in the resized picture, target size."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    top, left = (
        (side * scale - target) / 2 for side, target in zip((picture.height, picture.width), size, strict=True)
    )
    return [picture.height, picture.width, round(top), round(left), height, width]


@torch.no_grad()
@pytest.mark.parametrize("flags", [[], ["--no_cache"], ["--random_flip", "--random_affine", 0.1]])
def test_a_step_equals_what_the_pipelines_parts_give_for_the_same_crop_caption_and_noise(prepared, xl_model, flags):
    """The loss is worked out here, with diffusers' own classes."""
    run, _, batches = prepared("--caption_dropout", 0.3, "--seed", 1, *flags)
    unet, vae = load_unet(xl_model).eval(), load_vae(xl_model)
    pipeline, noises = (
        StableDiffusionXLPipeline.from_pretrained(xl_model),
        DDPMScheduler.from_pretrained(xl_model / "scheduler"),
    )
    step_batches, empty = batches._batches, 0
    for step in range(3):
        keys = [SampleKey(DATA, step * 2 + i) for i in range(2)]
        samples = {k.number: make_sample(1, k, step_batches.sources[DATA], step_batches.settings) for k in keys}
        found = [
            loss for batch, _ in batches.for_step(step) for loss in diffusion_loss(unet, run.objective, batch).tolist()
        ]
        expected = []
        for sample in samples.values():
            picture, size = run.plan.pictures[sample.picture], run.plan.sizes[sample.picture]
            pixels = apply_augmentation(load_pixel_values(picture.path, *size), sample.augmentation)
            posterior = vae.encode(pixels[None]).latent_dist
            latents = (posterior.mean + posterior.std * sample.posterior_noise) * vae.config.scaling_factor
            states, zeros, pooled, pooled_zeros = pipeline.encode_prompt(sample.caption, device="cpu")
            if not sample.caption:
                states, pooled, empty = zeros, pooled_zeros, empty + 1
            timestep = torch.tensor([sample.timestep])
            told = {"text_embeds": pooled, "time_ids": torch.tensor([crop_of(picture, size)])}
            noisy = noises.add_noise(latents, sample.noise[None], timestep)
            prediction = unet(noisy, timestep, states, added_cond_kwargs=told).sample
            expected.append((prediction - sample.noise).square().mean().item())
        assert sorted(found) == pytest.approx(sorted(expected), rel=2e-3)
    assert empty


def test_what_is_told_of_sizes_goes_to_every_stream(prepared):
    run, encodings, batches = prepared("--validation_split", 0.5, "--prior_images", 2, "--random_flip", "--seed", 1)
    main = run.plan.main_size
    for batch, _ in batches.for_step(0):
        for row, told in enumerate(batch.conditions.time_ids.tolist()):
            size = [side * run.plan.shape.vae_factor for side in batch.latents.shape[2:]]
            assert told[4:] == size
            assert told in ([*main, 0, 0, *main], crop_of(run.plan.pictures[0], size)), row
    for stream, samples in fixed_samples_of(run).items():
        pictures, sizes = (
            (run.plan.pictures, run.plan.sizes) if stream == DATA else (run.plan.held_out, run.plan.held_out_sizes)
        )
        assert {sample.time_ids for sample in samples} == {
            tuple(crop_of(*each)) for each in zip(pictures, sizes, strict=True)
        }
    assert {HELD_OUT, DATA} == set(fixed_samples_of(run)) and PRIOR in batches._batches.sources


def test_stored_text_is_read_as_it_would_be_at_once_rounded_to_fp16(prepared):
    _, stored, _ = prepared()
    _, live, _ = prepared("--no_cache")
    for caption in ("a denim a laid flat on white", ""):
        for kept, now in zip(stored.text(caption), live.text(caption), strict=True):
            assert torch.equal(kept, now.half().float())


WAYS = {
    "EMA": ["--use_ema", "--gradient_checkpointing"],
    "LoRA in bf16": ["--lora_rank", 2, "--mixed_precision", "bf16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
@pytest.mark.usefixtures("few_sampling_steps")
def test_a_stopped_run_goes_on_to_the_same_bits_and_its_result_loads(
    train_run, xl_model, landscape_and_portrait, flags
):
    usual = [*QUICK, *flags, "--seed", 0, "--learning_rate", 1e-3, "--lr_scheduler", "constant", "--prior_images", 1,
             "--checkpointing_steps", 2, "--validation_steps", 2, "--validation_prompts", "denim"]  # fmt: skip
    where = {"model": xl_model, "dataset": landscape_and_portrait}
    whole = train_run("whole", *usual, "--max_train_steps", 4, **where)
    train_run("parts", *usual, "--max_train_steps", 2, **where)
    parts = train_run("parts", *usual, "--max_train_steps", 4, **where)
    assert_same_bits(whole, parts, 4)
    assert losses(whole) == losses(parts) and all(map(math.isfinite, losses(whole)))
    assert len(list((whole / "validation").glob("*.png"))) == 3  # of the base too
    if "--lora_rank" in flags:
        pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
        pipeline.load_lora_weights(whole)
        assert any(name.endswith("lora_A.default_0.weight") for name, _ in pipeline.unet.named_parameters())
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(whole)
        assert pipeline.config.force_zeros_for_empty_prompt and pipeline.tokenizer_2.pad_token == "!"
        assert not torch.equal(
            *(folder["conv_in.weight"] for folder in (weights(whole), load_unet(xl_model).state_dict()))
        )


def test_its_learning_rate_is_its_own_unless_a_flag_names_one(prepared):
    assert prepared()[0].plan.learning_rate == prepared()[0].record["arguments"]["learning_rate"] == 5e-6
    assert prepared("--learning_rate", 1e-5)[0].plan.learning_rate == 1e-5
    assert prepared("--lora_rank", 2)[0].plan.learning_rate == 1e-4


def test_a_flag_for_the_text_encoders_is_refused_with_the_reason():
    with pytest.raises(UserError, match="--train_text_encoder: the text encoders stay as they are.*--trigger"):
        parse_args(["--dataset", "x", "--train_text_encoder"])
