"""The loss on fixed noise, and the pictures that are generated while training."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from models.loading import load_noise_scheduler
from models.samplers import SamplingSettings
from models.text_encoding import TextEmbedding
from optimization.ema import NoEMA, averaged, make_ema
from optimization.parameters import ModelParameters
from plain_conditions import ANY_SIZE, text_alone
from tiny_model import tiny_unet
from training.objective import Objective
from training.samples import Encoded
from training.state import TrainState
from training.validation import (
    FixedNoiseLoss,
    ValidationSampler,
    Validator,
    best_step,
    fixed_samples,
    measured_steps,
    sampled_steps,
)

SHAPES = [(4, 8, 8), (4, 8, 12), (4, 8, 8)]


def state_of(unet, parameters, ema) -> TrainState:
    return TrainState(Accelerator(), None, unet, unet, parameters, None, ema)


def images_of(captions):
    return [SimpleNamespace(captions=[caption], time_ids=ANY_SIZE) for caption in captions]


class Encodings:
    def encode(self, samples):
        latents = torch.stack([sample.posterior_noise for sample in samples])
        return Encoded(latents, text_alone(torch.ones(len(samples), 77, 16)))


@pytest.fixture
def fixed_loss(tiny_model):
    samples = {"data": fixed_samples("data", images_of(["a", "b", "c"]), SHAPES, 1000)}
    objective = Objective(load_noise_scheduler(tiny_model))
    return FixedNoiseLoss(samples, Encodings(), objective, torch.device("cpu"), torch.float32)


def test_the_samples_are_the_same_every_time_whatever_the_global_rng_did_before():
    torch.manual_seed(1)
    first = fixed_samples("data", images_of(["a", "b", "c"]), SHAPES, 1000)
    torch.manual_seed(2)
    second = fixed_samples("data", images_of(["a", "b", "c"]), SHAPES, 1000)
    assert all(torch.equal(a.noise, b.noise) and a.timestep == b.timestep for a, b in zip(first, second, strict=True))
    assert sorted({sample.timestep for sample in first}) == [125, 375, 625, 875]
    assert [sample.picture for sample in first] == sorted([0, 1, 2] * 4)


def test_of_many_pictures_some_are_taken_evenly():
    chosen = {sample.picture for sample in fixed_samples("data", images_of(["x"] * 1000), [(4, 2, 2)] * 1000, 1000)}
    assert len(chosen) == 16 and {0, 999} <= chosen


def test_measuring_gives_the_same_number_again_and_touches_neither_weights_nor_rng(fixed_loss):
    torch.manual_seed(0)
    unet = tiny_unet()
    accelerator, state = Accelerator(), torch.get_rng_state()
    before = [p.clone() for p in unet.parameters()]
    first, second = (fixed_loss.measure(unet, accelerator) for _ in range(2))
    assert first == second and first["train_fixed_loss"] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, unet.parameters(), strict=True))


def test_the_averaged_weights_are_measured_beside_and_put_back(fixed_loss):
    unet = tiny_unet()
    weights = ModelParameters(unet)
    average = make_ema(SimpleNamespace(use_ema=True, offload_ema=False), unet, weights.parameters, None)
    with torch.no_grad():
        for p in weights.parameters:
            p += 0.05
    trained = [p.clone() for p in weights.parameters]
    validator = Validator(state_of(unet, weights, average), fixed_loss, None, {3}, {3})
    assert validator.measure(2, None) == {}
    found = validator.measure(3, contextlib.nullcontext)
    assert found.keys() == {"train_fixed_loss", "train_fixed_loss_ema"}
    assert found["train_fixed_loss"] != found["train_fixed_loss_ema"]
    assert all(torch.equal(a, b) for a, b in zip(trained, weights.parameters, strict=True))
    with averaged(average, weights):
        inside = fixed_loss.measure(unet, Accelerator(), "_ema")
    assert inside["train_fixed_loss_ema"] == found["train_fixed_loss_ema"]


def test_prompts_are_generated_with_the_averaged_weights_that_are_put_back(fixed_loss):
    unet, seen = tiny_unet(), []
    weights = ModelParameters(unet)
    settings = SimpleNamespace(use_ema=True, offload_ema=False)
    average = make_ema(settings, unet, weights.parameters, None)
    begun = [p.detach().clone() for p in weights.parameters]
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter += 1
    sampler = SimpleNamespace(generate=lambda unet, step: seen.extend(p.detach().clone() for p in unet.parameters()))
    Validator(state_of(unet, weights, average), fixed_loss, sampler, set(), {5}).generate(5, contextlib.nullcontext)
    assert all(torch.equal(*pair) for pair in zip(seen, begun, strict=True))
    assert all(torch.equal(parameter, before + 1) for parameter, before in zip(weights.parameters, begun, strict=True))


def test_its_prompt_and_the_empty_prompt_guide_each_picture(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "training.validation.generate_latents",
        lambda unet, scheduler, noise, conditions, _: asked.append(conditions) or noise,
    )
    monkeypatch.setattr(
        "training.validation.decode_latents", lambda vae, latents: [Image.new("RGB", (8, 8))] * len(latents)
    )
    texts = {
        prompt: TextEmbedding(torch.full((3, 1), i), torch.full((1,), i)) for i, prompt in enumerate(["", "a", "b"])
    }
    encodings, settings = SimpleNamespace(text=texts.get), SamplingSettings(25, 4.0)
    ValidationSampler(["a", "b"], 2, encodings, None, None, (4, 2, 2), (16, 24), settings, tmp_path).generate(None, 7)
    assert [each.pooled.flatten().tolist() for each in asked] == [[0, 1], [0, 1], [0, 2], [0, 2]]
    assert all(each.time_ids.tolist() == [[16, 24, 0, 0, 16, 24]] * 2 for each in asked)
    assert len(list(tmp_path.glob("step-000007-*.png"))) == 4


def test_without_an_average_only_the_weights_are_measured(fixed_loss):
    unet = tiny_unet()
    validator = Validator(state_of(unet, ModelParameters(unet), NoEMA()), fixed_loss, None, {1}, {1})
    assert validator.measure(1, contextlib.nullcontext).keys() == {"train_fixed_loss"}


def samples_of(pictures: int, stream: str = "data") -> dict:
    return {stream: fixed_samples(stream, images_of(["x"] * pictures), [(4, 2, 2)] * pictures, 1000)}


def test_the_loss_is_measured_four_times_in_a_run_and_ten_with_held_out_pictures_and_where_a_checkpoint_is_kept():
    assert measured_steps(600, 6, samples_of(3), 2, None, 500) == {150, 300, 450, 600}
    assert measured_steps(600, 6, samples_of(3, "held out"), 2, None, 500) == {*range(60, 601, 60), 500}
    assert measured_steps(600, 6, samples_of(3), 2, 250, 500) == {250, 500, 600}


def test_measuring_takes_at_most_a_tenth_of_a_short_run_but_the_end_is_always_measured():
    assert measured_steps(4, 2, samples_of(3), 1, None, 500) == {4}
    both = samples_of(16) | samples_of(16, "held out")
    for length in (5, 99, 100, 101, 400, 599, 601, 1999):
        steps = measured_steps(length, 4, both, 2, None, 10_000)
        forward_passes = len(steps) * 2 * sum(map(len, both.values()))
        assert max(steps) == length
        assert len(steps) == 1 or (len(steps) <= 10 and forward_passes <= 0.1 * length * 4 * 3), length


def test_prompts_are_generated_four_times_or_as_the_flags_say_and_always_at_the_end():
    assert sampled_steps(600, 6, None, None) == {150, 300, 450, 600}
    assert sampled_steps(600, 6, None, 250) == {250, 500, 600}
    assert sampled_steps(20, 2.5, 3, 250) == {8, 16, 20}  # an epoch ends within a step


def test_the_best_step_is_that_of_the_weights_that_are_saved():
    rows = [
        {"step": 1},
        {"step": 2, "val_loss": 0.2, "val_loss_ema": 0.4},
        {"step": 4, "val_loss": 0.3, "val_loss_ema": 0.1},
    ]
    assert best_step(rows) == (4, "val_loss_ema", 0.1)
    assert best_step([{"step": 2, "val_loss": 0.2}, {"step": 3, "val_loss": 0.3}]) == (2, "val_loss", 0.2)
    assert best_step(rows, among={1, 2}) == (2, "val_loss_ema", 0.4)
    assert best_step([{"step": 2, "train_fixed_loss": 0.2}]) is None
