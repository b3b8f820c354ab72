"""The starter model is an ordinary pipeline that generates what it is asked for, and its classifier can be trusted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from background import run_script
from classifier import accuracy, classify, load_classifier
from clone import ROOT
from measure_base import generate_samples, psnr_on
from models.loading import load_prompt_encoder, load_tokenizer
from models.sampling import guidance_scale_of
from models.text_encoding import count_tokens
from pictures import HELD_OUT
from render_garments import render, sample_spec
from runtime.paths import STARTER

# Sentences with the number of tokens that CLIP's own tokenizer makes of them, start and end included.
ENGLISH = {
    "A photo of an astronaut riding a horse on the moon, highly detailed": 16,
    "The old man walked slowly through the quiet village while his dog slept beneath the kitchen table": 19,
    "Two children are playing football in the park near a small lake, with mountains in the background": 20,
    "A bowl of fresh strawberries and blueberries on a rustic wooden table, soft morning light": 18,
    "She bought a leather jacket, a woollen scarf and three pairs of cotton socks at the market yesterday": 22,
    "The quick brown fox jumps over the lazy dog": 11,
    "Portrait of a young woman with curly hair and freckles, wearing a green velvet dress, studio lighting": 21,
}


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def test_it_is_a_small_folder_with_everything_that_other_tools_look_for():
    files = {str(path.relative_to(STARTER)) for path in STARTER.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in STARTER.rglob("*") if path.is_file()) <= 22e6
    assert {"model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "LICENSE", "README.md"} <= files
    assert all(f"{part}/config.json" in files for part in ("unet", "vae", "text_encoder"))
    assert json.loads((STARTER / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"


@pytest.mark.slow
def test_plain_diffusers_loads_it_and_generates_with_it():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(STARTER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": guidance_scale_of(STARTER), "generator": torch.Generator().manual_seed(0)}
    image = pipeline("a red t-shirt", num_inference_steps=25, **settings).images[0]
    red, green, _ = np.asarray(image)[96:160, 96:160].reshape(-1, 3).mean(0)
    assert image.size == (256, 256) and red > green + 60


def test_its_prior_prompts_name_nothing_that_the_data_set_shows():
    """A white shirt with the jeans' black square lent them its white and its buttons."""
    defaults = json.loads((STARTER / "training_defaults.json").read_text())
    prompts = defaults["prior_prompts"]
    assert defaults["prior_images"] % len(prompts) == 0
    assert not [prompt for prompt in prompts for word in ("denim", "jeans", "upper right") if word in prompt]


@pytest.mark.parametrize("sentence", ENGLISH)
def test_an_english_sentence_takes_at_most_half_more_tokens_than_clips(sentence):
    assert count_tokens(load_tokenizer(STARTER), sentence) + 2 <= 1.5 * ENGLISH[sentence]


@torch.no_grad()
def test_the_encoder_responds_to_unseen_words_so_that_they_can_be_taught():
    """A text that the encoder takes for the empty caption can mean nothing to the UNet."""
    encoder = load_prompt_encoder(STARTER, 1)
    texts = {text: encoder(text).hidden_states for text in ("", "denim jeans", "red t-shirt")}
    unknown, known = ((texts[text] - texts[""]).norm() for text in ("denim jeans", "red t-shirt"))
    assert unknown > 0.3 * known


@pytest.mark.slow
def test_the_classifier_is_right_about_unseen_renders(classifier):
    shares = accuracy(classifier, 60)
    assert shares.pop("view") >= 0.93  # front and back are the hardest to distinguish
    assert all(share >= 0.95 for share in shares.values()), shares


@pytest.mark.slow
def test_the_classifier_takes_jeans_for_trousers(classifier):
    found = classify(classifier, [render(sample_spec(HELD_OUT + i, "jeans"), 224, 288) for i in range(12)])
    assert sum(f["kind"] == "trousers" for f in found) >= 11


@pytest.mark.slow
def test_it_generates_the_garments_and_colours_it_is_asked_for(classifier):
    asked = [("red", "t-shirt"), ("green", "trousers"), ("yellow", "dress"), ("purple", "hoodie"), ("black", "skirt")]
    prompts = [f"A {colour} {kind} laid flat on a white background" for colour, kind in asked]
    found = classify(
        classifier, generate_samples(STARTER, prompts, [(256, 256)] * len(asked), 25, guidance_scale_of(STARTER))
    )
    right = sum((f["colour"], f["kind"]) == pair for f, pair in zip(found, asked, strict=True))
    assert right >= len(asked) - 1, found


def test_its_vae_reconstructs_the_data_sets_pictures():
    whole, garment = psnr_on(STARTER, ROOT / "dataset")
    assert whole >= 32 and garment >= 27


@pytest.mark.slow
def test_pretraining_goes_through_all_stages_and_on_after_a_stop(tmp_path):
    script = ROOT / "text_to_image" / "starter" / "pretrain_base.py"

    def pretrain(*flags: object) -> None:
        sizes = ["--pictures", 24, "--vae_steps", 2, "--decoder_steps", 1, "--samples", 128, 64, 24, 12]
        done = run_script(script, "--work", tmp_path / "work", *sizes, "--to", tmp_path / "base", *flags)
        assert done.returncode == 0, done.stderr[-2000:]

    pretrain("--stage", "render")
    rendered = (tmp_path / "work" / "pictures-256x256.npy").stat().st_mtime_ns
    pretrain()
    assert (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "work" / "pictures-256x256.npy").stat().st_mtime_ns == rendered
    before = Path(tmp_path / "work" / "unet256.pt").stat().st_mtime_ns
    pretrain()
    assert Path(tmp_path / "work" / "unet256.pt").stat().st_mtime_ns == before

    for checkpoint in (tmp_path / "work").glob("*.pt"):
        checkpoint.unlink()
    pretrain("--stage", "trousers", "--base", tmp_path / "base")
    assert {path.name for path in (tmp_path / "work").glob("*.pt")} == {"trousers.pt"}
    begun_with = UNet2DConditionModel.from_pretrained(tmp_path / "base", subfolder="unet").conv_in.weight.float()
    learned = torch.load(tmp_path / "work" / "trousers.pt", weights_only=True)["model"]["unet.conv_in.weight"]
    assert 0 < (learned - begun_with).abs().max() < 1e-3  # one step of the warm-up away
