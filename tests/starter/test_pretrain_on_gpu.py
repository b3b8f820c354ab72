"""The starter is pre-trained further within a time limit; what it begins with is what the shipped model can do."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from background import run_script
from clone import ROOT
from gpu_pictures import random_crops
from pictures import PAIRS, RenderStream, pair_specs, picture_specs
from pretrain_on_gpu import VAE_WIDTHS, Trainer, widened_vae
from render_garments import render, sample_spec
from runtime.paths import STARTER


@torch.no_grad()
def test_the_widened_vae_begins_nearly_as_good_as_the_shipped_one():
    old = AutoencoderKL.from_pretrained(STARTER, subfolder="vae", torch_dtype=torch.float32)
    image = torch.from_numpy(np.array(render(sample_spec(1), 128, 128))).permute(2, 0, 1)[None] / 127.5 - 1
    errors = []
    for vae in (old, widened_vae(old, VAE_WIDTHS)):
        assert vae.config.latent_channels == 4
        errors.append((vae.decode(vae.encode(image).latent_dist.mean).sample - image).square().mean().item())
    assert errors[1] < 2.5 * errors[0]


def test_streamed_pictures_are_those_that_the_sets_describe(tmp_path):
    stream = RenderStream(tmp_path, 24, ["pictures"], workers=2, slice_length=4)
    for jobs in stream._jobs.values():
        for job in jobs:
            job.result()
    assert stream.ready("pictures", 0) == 12 and stream.ready(PAIRS, 0) == 2 * len(pair_specs(0, 24))
    assert np.array_equal(stream.pictures["pictures", 1][5], np.asarray(render(picture_specs(1, 24)[5], 224, 288)))
    front, back = stream.pictures[PAIRS, 0][:2]
    assert (front != back).any() and np.array_equal(front[:4], back[:4])
    stream.stop()


def test_crops_lie_inside_their_pictures():
    pictures = torch.arange(2 * 6 * 8 * 3, dtype=torch.uint8).reshape(2, 6, 8, 3)
    crops = random_crops(pictures, 50, 4, np.random.default_rng(0))
    assert crops.shape == (50, 3, 4, 4)
    step = (crops[:, 0, 1:] - crops[:, 0, :-1]) * 127.5
    assert torch.allclose(step.remainder(256), torch.tensor(24.0), atol=1e-3)  # a row below is 8 pixels of 3 further


def test_masters_of_bf16_weights_take_the_steps_that_adamw_takes():
    """One layer has a bf16 copy and one has none, as UNet and text encoder; no gradient is left over from a step."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)])
    reference, fast = copy.deepcopy(layers), copy.deepcopy(layers[1]).to(torch.bfloat16)
    weights = [*layers[0].parameters(), *fast.parameters()]
    trainer = Trainer(layers.parameters(), weights, 0.01, warm_up=1, ema_decay=0.5)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01 + 1e-6, betas=(0.9, 0.99), weight_decay=0.01)
    x = torch.randn(64, 8)
    for _ in range(20):
        trainer.step((fast(layers[0](x).bfloat16()).float() - x[:, :1]).square().mean(), done=0.0)
        optimizer.zero_grad()
        (reference[1](reference[0](x)) - x[:, :1]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    for learned, expected in zip(layers.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(learned, expected, atol=0.02)
    assert torch.equal(layers[1].weight.bfloat16(), fast.weight)
    assert not torch.equal(trainer.ema[0], layers[0].weight)
    assert torch.allclose(trainer.ema[0], layers[0].weight, atol=0.1)


@pytest.mark.slow
def test_it_goes_through_all_stages_within_its_time_and_its_result_can_be_installed(tmp_path):
    script, photos = ROOT / "text_to_image" / "starter" / "pretrain_on_gpu.py", tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (256, 256, 3), np.uint8)).save(photos / f"{i}.jpg")
    small = ["--pictures", 24, "--batch", 2, "--vae_batch", 6, "--sheet_steps", 1, "--seconds", 150]
    done = run_script(script, "--photos", photos, "--judged", photos, "--to", tmp_path / "result", *small)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in (tmp_path / "result").iterdir()}
    assert names == {
        "vae.safetensors",
        "unet.safetensors",
        "text.safetensors",
        "figures.json",
        "vae.jpg",
        "samples.jpg",
    }
    assert json.loads((tmp_path / "result" / "figures.json").read_text())["unet_steps"] > 0
    done = run_script(script, "--install", tmp_path / "result", "--to", tmp_path / "base")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        AutoencoderKL.from_pretrained(tmp_path / "base", subfolder="vae").config.block_out_channels[2] == VAE_WIDTHS[2]
    )
