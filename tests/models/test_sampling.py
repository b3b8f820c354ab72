"""Sampling gives what plain diffusers gives, whatever the batch."""

import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from models.loading import load_prompt_encoder, load_unet, load_vae
from models.samplers import SAMPLERS, SamplingSettings
from models.sampling import (
    decode_in_tiles,
    decode_latents,
    generate_latents,
    initial_noise,
    load_sampler,
    sampling_conditions,
    seeded_generator,
)
from tiny_model import make_tiny_model


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def sample(model):
    """Latents (B, 4, 36, 28) of B prompts and seeds."""
    encoder, unet = load_prompt_encoder(model, 3), load_unet(model).eval()

    def sample(prompts, seeds, guidance_scale=5.0, negative="", steps=5, rescale=0.0, name="dpmpp_2m_karras"):
        pairs = [(encoder(prompt), encoder(negative)) for prompt in prompts]
        generators = [seeded_generator(seed) for seed in seeds]
        noise = torch.stack([initial_noise(generator, (4, 36, 28)) for generator in generators])
        settings = SamplingSettings(steps, guidance_scale, rescale)
        conditions = sampling_conditions(pairs, (72, 56), settings)
        return generate_latents(unet, load_sampler(model, name=name), noise, conditions, settings, generators)

    return sample


@pytest.mark.parametrize(("guidance_scale", "negative"), [(5.0, ""), (7.5, "a red shirt"), (1.0, "")])
def test_latents_and_pictures_equal_those_of_plain_diffusers(model, sample, guidance_scale, negative):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 72, "width": 56, "num_inference_steps": 5, "guidance_scale": guidance_scale}
    settings |= {"negative_prompt": negative, "generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    expected = pipeline("denim jeans", **settings).images
    latents = sample(["denim jeans"], [3], guidance_scale, negative)
    assert torch.allclose(latents, expected, atol=1e-3 * expected.abs().max())
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0].detach()
    assert decode_latents(load_vae(model), latents)[0] == pipeline.image_processor.postprocess(decoded)[0]


def test_tiles_make_nearly_the_picture_that_is_decoded_at_once(model, monkeypatch):
    vae, latents = load_vae(model), torch.randn(1, 4, 48, 40, generator=torch.Generator().manual_seed(0))
    [whole] = decode_latents(vae, latents)
    monkeypatch.setattr("models.sampling.TILE", 64)
    decode_in_tiles(vae)
    [tiled] = decode_latents(vae, latents)
    assert whole.size == tiled.size == (80, 96)
    difference = np.abs(np.asarray(whole, dtype=float) - np.asarray(tiled, dtype=float))
    assert 0 < difference.mean() < 10  # of 255: group norms see a tile alone


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_what_its_scheduler_gives_in_plain_diffusers(model, sample, name):
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    scheduler = getattr(diffusers, SAMPLERS[name].scheduler_class)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **SAMPLERS[name].config)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 72, "width": 56, "num_inference_steps": 6, "guidance_scale": 5.0, "guidance_rescale": 0.7}
    settings |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    expected = pipeline("denim jeans", **settings).images
    latents = sample(["denim jeans"], [3], steps=6, rescale=0.7, name=name)
    assert torch.isfinite(latents).all()
    assert torch.allclose(latents, expected, atol=1e-3 * expected.abs().max())


def test_a_models_own_config_does_not_change_what_a_sampler_is(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    own = {**json.loads(path.read_text()), "use_karras_sigmas": True, "skip_prk_steps": False, "clip_sample": True}
    path.write_text(json.dumps(own))
    for name in SAMPLERS:
        sampler = load_sampler(folder, name=name)
        known = {key: sampler.config[key] for key in inspect.signature(type(sampler)).parameters}
        assert bool(known.get("use_karras_sigmas")) == name.endswith("karras"), name
        assert known.get("skip_prk_steps", True) and not known.get("clip_sample", False), name


def test_noise_between_the_steps_is_each_pictures_own_too(sample):
    together = sample(["denim jeans", "the white"], [4, 5], name="euler_a")
    alone = sample(["the white"], [5], name="euler_a")
    assert torch.allclose(together[1], alone[0], atol=1e-3 * alone.abs().max())
    assert not torch.allclose(sample(["the white"], [6], name="euler_a"), alone, atol=0.1)


def test_latents_do_not_depend_on_their_batch(sample):
    prompts, seeds = ["denim jeans", "a red t-shirt " * 30, "the white"], [0, 1, 2]
    together = sample(prompts, seeds)
    alone = torch.cat([sample([prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)])
    assert torch.allclose(together, alone, atol=1e-3 * alone.abs().max())


def test_guidance_and_the_negative_prompt_have_an_effect(sample):
    plain, guided = sample(["denim jeans"], [0], 1.0), sample(["denim jeans"], [0], 7.5)
    negative = sample(["denim jeans"], [0], 7.5, negative="a red shirt")
    assert not torch.allclose(plain, guided, atol=1e-3) and not torch.allclose(guided, negative, atol=1e-3)


def test_noise_is_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first = initial_noise(1, (4, 2, 2))
    assert torch.equal(initial_noise(1, (4, 2, 2)), first)
    assert not torch.equal(initial_noise(2, (4, 2, 2)), first)
