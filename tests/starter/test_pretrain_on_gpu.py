"""The starter is pre-trained further within a time limit, on pictures that are rendered meanwhile."""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pictures
import pretrain_on_gpu
from gpu_pictures import random_crops
from pictures import PAIRS, RenderStream, pair_specs, picture_specs
from render_garments import render
from runtime.paths import STARTER
from trainer import Trainer


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


def noise(spec, w: int, h: int, same_layout: bool) -> np.ndarray:
    """Instead of a render; front and back differ."""
    return np.random.default_rng(spec.view == "front").integers(0, 255, (h, w, 3), np.uint8)


@pytest.mark.slow
def test_a_short_run_leaves_weights_that_can_be_installed_and_no_renders(tmp_path, monkeypatch):
    result, base, temporary = tmp_path / "result", tmp_path / "base", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(pretrain_on_gpu, "PROMPTS", ("a red t-shirt",))
    monkeypatch.setattr(pictures, "render", noise)  # the forked workers have it too; renders take most of the time

    def run(*flags) -> None:
        monkeypatch.setattr(sys, "argv", ["pretrain_on_gpu.py", *map(str, flags)])
        pretrain_on_gpu.main()

    small = ["--pictures", 24, "--batch", 2, "--sheet_steps", 1, "--render_workers", 2, "--caption_workers", 1]
    run("--to", result, "--seconds", 0.1, *small)
    names = {path.name for path in result.iterdir()}
    assert names == {"unet.safetensors", "text.safetensors", "figures.json", "samples.jpg"}
    assert json.loads((result / "figures.json").read_text())["unet_steps"] == 1
    assert list(temporary.glob("**/*.npy")) == []
    run("--install", result, "--to", base)
    vae = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (base / vae).read_bytes() == (STARTER / vae).read_bytes()
    learned = load_file(result / "unet.safetensors")["conv_in.weight"]
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(unet["conv_in.weight"], learned)
