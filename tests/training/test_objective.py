"""The objective against the formulas of its papers."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from plain_conditions import text_alone
from training.objective import (
    Objective,
    diffusion_loss,
    dream,
    make_objective,
    prediction_target,
    signal_to_noise,
    snr_weights,
)
from training.samples import Batch

TIMESTEPS = torch.tensor([0, 1, 250, 500, 750, 999])


def scheduler(prediction_type: str, **settings) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type, **settings
    )


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()


class FixedUNet:
    """Predicts the same for all, whatever it is given."""

    def __init__(self, prediction: torch.Tensor):
        self.sample = prediction

    def __call__(self, noisy_latents, timesteps, **conditions):
        return self


def loss_of(prediction, noise_scheduler, latents, noise, snr_gamma=None) -> torch.Tensor:
    batch = Batch(latents, noise, noise, TIMESTEPS, text_alone(torch.zeros(6, 77, 8)))
    return diffusion_loss(FixedUNet(prediction), Objective(noise_scheduler, snr_gamma), batch)


def test_epsilon_is_the_noise_and_v_is_its_papers_combination():
    latents, noise = pair()
    alpha_bar = scheduler("epsilon").alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    assert torch.equal(prediction_target(scheduler("epsilon"), latents, noise, TIMESTEPS), noise)
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    assert torch.allclose(prediction_target(scheduler("v_prediction"), latents, noise, TIMESTEPS), v, atol=1e-6)


def test_the_loss_is_each_samples_mean_squared_error():
    latents, noise = pair()
    offsets = torch.arange(6.0).view(-1, 1, 1, 1)
    loss = loss_of(noise + offsets, scheduler("epsilon"), latents, noise)
    assert torch.allclose(loss, torch.arange(6.0) ** 2, atol=1e-5)


def test_snr_is_diffusers_own():
    assert torch.allclose(
        signal_to_noise(scheduler("epsilon"), TIMESTEPS), compute_snr(scheduler("epsilon"), TIMESTEPS)
    )


def test_min_snr_weights_are_those_of_the_paper():
    snr = compute_snr(scheduler("epsilon"), TIMESTEPS)
    clipped = torch.minimum(snr, torch.full_like(snr, 5.0))
    assert torch.allclose(snr_weights(scheduler("epsilon"), TIMESTEPS, 5.0), clipped / snr)
    assert torch.allclose(snr_weights(scheduler("v_prediction"), TIMESTEPS, 5.0), clipped / (snr + 1))


def test_the_flags_reach_the_objective():
    args = Namespace(snr_gamma=5.0, dream_training=True, dream_detail_preservation=2.0)
    noise_scheduler = scheduler("epsilon")
    assert make_objective(args, noise_scheduler) == Objective(noise_scheduler, 5.0, 2.0)


@pytest.mark.parametrize("gamma", [None, 0.0])
def test_without_gamma_all_timesteps_weigh_the_same(gamma):
    assert snr_weights(scheduler("epsilon"), TIMESTEPS, gamma).tolist() == [1.0] * 6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_gives_no_nan(prediction_type):
    noise_scheduler = scheduler(prediction_type, rescale_betas_zero_snr=True)
    latents, noise = pair()
    assert signal_to_noise(noise_scheduler, TIMESTEPS)[-1] == 0
    assert loss_of(noise + 1, noise_scheduler, latents, noise, 5.0).isfinite().all()


def test_the_same_error_of_the_picture_weighs_the_same_in_epsilon_and_v():
    """The paper weighs errors of x0: an error d of it is d * sqrt(SNR) of the noise and d * sqrt(SNR + 1) of v."""
    snr = compute_snr(scheduler("epsilon"), TIMESTEPS)
    of_noise = snr_weights(scheduler("epsilon"), TIMESTEPS, 5.0) * snr
    of_v = snr_weights(scheduler("v_prediction"), TIMESTEPS, 5.0) * (snr + 1)
    assert torch.allclose(of_noise, of_v, rtol=1e-4)


def test_with_a_zero_terminal_snr_the_last_timestep_of_v_is_learned():
    """The paper's min(SNR, γ)/(SNR + 1) is 0 there; with SNR + 1 it is 1, and elsewhere nearly the paper's."""
    weights = snr_weights(scheduler("v_prediction", rescale_betas_zero_snr=True), TIMESTEPS, 5.0)
    assert weights[-1] == 1
    snr = signal_to_noise(scheduler("v_prediction", rescale_betas_zero_snr=True), TIMESTEPS)
    assert torch.allclose(weights, torch.minimum(snr + 1, torch.tensor(5.0)) / (snr + 1))


def test_a_model_that_predicts_the_sample_is_asked_for_it():
    latents, noise = pair()
    assert torch.equal(prediction_target(scheduler("sample"), latents, noise, TIMESTEPS), latents)


def test_dreams_target_is_no_way_for_gradients():
    """arXiv:2312.00210 stops them: else the target would move towards what is predicted."""

    def unet(noisy_latents, *_, **__):
        return SimpleNamespace(sample=weight * noisy_latents)

    weight, (latents, noise) = torch.ones((), requires_grad=True), pair()
    batch = Batch(latents, noise, noise, TIMESTEPS, text_alone(torch.zeros(6, 77, 8)))
    objective = Objective(scheduler("epsilon"), dream_detail_preservation=1.0)
    assert not any(found.requires_grad for found in dream(unet, objective, batch, latents, noise))


def test_dream_is_its_papers_formula():
    """arXiv:2312.00210: x_t + sqrt(1 - ᾱ) λ (ε - ε_θ) is to be answered with ε + λ (ε - ε_θ), λ = sqrt(1 - ᾱ)^p."""
    latents, noise = pair()
    batch = Batch(latents, noise, noise, TIMESTEPS, text_alone(torch.zeros(6, 77, 8)))
    noise_scheduler, predicted = scheduler("epsilon"), noise + 0.5
    objective = Objective(noise_scheduler, dream_detail_preservation=2.0)
    noisy = noise_scheduler.add_noise(latents, noise, TIMESTEPS)
    sigma = (1 - noise_scheduler.alphas_cumprod[TIMESTEPS]).sqrt().view(-1, 1, 1, 1)
    shown, target = dream(FixedUNet(predicted), objective, batch, noisy, noise)
    assert torch.allclose(shown, noisy - 0.5 * sigma**3, atol=1e-5)
    assert torch.allclose(target, noise - 0.5 * sigma**2, atol=1e-5)
    loss = diffusion_loss(FixedUNet(predicted), objective, batch)
    assert torch.allclose(loss, ((0.5 + 0.5 * sigma**2) ** 2).flatten(), atol=1e-4)


def test_perturbed_noise_is_seen_and_the_plain_noise_is_the_target():
    latents, noise = pair()
    seen = []

    class Looking(FixedUNet):
        def __call__(self, noisy_latents, *rest, **more):
            seen.append(noisy_latents)
            return self

    batch = Batch(latents, noise, noise + 1, TIMESTEPS, text_alone(torch.zeros(6, 77, 8)))
    loss = diffusion_loss(Looking(noise), Objective(scheduler("epsilon")), batch)
    assert torch.allclose(seen[0], scheduler("epsilon").add_noise(latents, noise + 1, TIMESTEPS))
    assert torch.allclose(loss, torch.zeros(6), atol=1e-6)
