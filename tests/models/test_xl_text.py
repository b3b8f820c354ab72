"""What Stable Diffusion XL reads of a prompt equals what diffusers' own pipeline makes of it."""

import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from models.conditions import Conditions
from models.folders import fingerprint_model, text_parts
from models.loading import load_prompt_encoder, load_unet
from models.samplers import SamplingSettings
from models.sampling import generate_latents, guidance_scale_of, initial_noise, load_sampler, sampling_conditions
from models.text_encoding import split_tokens

LONG = "a red t-shirt, " * 20


@pytest.fixture(scope="module")
def pipeline(xl_model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def encoder(xl_model):
    return load_prompt_encoder(xl_model, 3)


def test_a_prompt_is_read_by_both_encoders_as_the_pipeline_reads_it(pipeline, encoder):
    states, _, pooled, _ = pipeline.encode_prompt("a pair of denim jeans", device="cpu")
    found = encoder("a pair of denim jeans")
    assert torch.equal(found.hidden_states, states[0]) and torch.equal(found.pooled, pooled[0])


@torch.no_grad()
def test_of_a_long_prompt_the_states_of_all_chunks_are_joined_and_the_first_is_pooled(encoder):
    found, chunks = encoder(LONG), split_tokens(encoder.tokenizer, LONG, 3)
    assert len(found.hidden_states) == 77 * len(chunks) > 77
    alone = [encoder.encode([encoder.tokenizer.decode(chunk[1:-1])])[0] for chunk in chunks]
    assert torch.allclose(found.pooled, alone[0].pooled, atol=1e-5)
    for number, chunk in enumerate(alone):
        assert torch.allclose(found.hidden_states[77 * number : 77 * (number + 1)], chunk.hidden_states, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_zeros_where_model_index_json_says_so(own_xl_model, zeros):
    index = own_xl_model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    pipeline, encoder = StableDiffusionXLPipeline.from_pretrained(own_xl_model), load_prompt_encoder(own_xl_model, 3)
    _, states, _, pooled = pipeline.encode_prompt("a", device="cpu")
    empty = encoder("")
    assert torch.equal(empty.hidden_states, states[0]) and torch.equal(empty.pooled, pooled[0])
    assert bool(empty.hidden_states.any()) is not zeros
    assert all(bool(tensor.any()) for tensor in encoder("a"))


def test_what_the_empty_prompt_is_counts_in_the_fingerprint(own_xl_model):
    """Encodings of it are kept under that name."""
    before = fingerprint_model(own_xl_model, text_parts(own_xl_model))
    index = own_xl_model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    assert fingerprint_model(own_xl_model, text_parts(own_xl_model)) != before


def test_zeros_mean_the_same_in_any_number_of_chunks(xl_model, encoder):
    unet, latents = load_unet(xl_model).eval(), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    empty = encoder("")
    with torch.no_grad():
        one, three = (
            unet(latents, 500, **Conditions.join([embedding], [(64, 64, 0, 0, 64, 64)]).unet_inputs()).sample
            for embedding in (empty, empty._replace(hidden_states=empty.hidden_states.repeat(3, 1)))
        )
    assert torch.allclose(one, three, atol=1e-6)


@pytest.mark.parametrize(("guidance_scale", "negative"), [(5.0, ""), (7.5, "a red shirt"), (1.0, "")])
def test_latents_equal_those_of_the_pipeline(xl_model, pipeline, encoder, guidance_scale, negative):
    settings, noise = SamplingSettings(4, guidance_scale), initial_noise(3, (4, 24, 16))[None]
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        "denim jeans", negative_prompt=negative or None, height=48, width=32, num_inference_steps=4,
        guidance_scale=guidance_scale, latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    conditions = sampling_conditions([(encoder("denim jeans"), encoder(negative))], (48, 32), settings)
    found = generate_latents(
        load_unet(xl_model).eval(), load_sampler(xl_model, name="euler"), noise, conditions, settings
    )
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max())


def test_time_ids_stay_exact_where_the_unet_reads_bf16(encoder):
    conditions = Conditions.join([encoder("a")], [(1365, 2047, 0, 13, 1152, 896)])
    conditions = conditions.to(torch.device("cpu"), torch.bfloat16)
    assert conditions.hidden_states.dtype == conditions.pooled.dtype == torch.bfloat16
    assert conditions.time_ids.tolist() == [[1365, 2047, 0, 13, 1152, 896]]


def test_xl_is_guided_less_unless_the_model_says_otherwise(own_xl_model, tiny_model):
    assert guidance_scale_of(own_xl_model) == 5 and guidance_scale_of(tiny_model) == 7.5
    (own_xl_model / "generation_defaults.json").write_text('{"guidance_scale": 0}')
    assert guidance_scale_of(own_xl_model) == 0
