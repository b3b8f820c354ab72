"""The training objective: noisy latents, the target that the UNet predicts, and the loss weight of each timestep."""

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from runtime.errors import UserError
from training.samples import Batch


@dataclass(frozen=True)
class Objective:
    """The forward process and the prediction target; the defaults are plain DDPM (arXiv:2006.11239)."""

    noise_scheduler: DDPMScheduler
    snr_gamma: float | None = None
    dream_detail_preservation: float | None = None  # None: no DREAM


def diffusion_loss(unet: torch.nn.Module, objective: Objective, batch: Batch) -> torch.Tensor:
    """(B,) the loss of each sample: weighted mean squared error of the UNet's prediction."""
    noise_scheduler, timesteps = objective.noise_scheduler, batch.timesteps
    noisy_latents = noise_scheduler.add_noise(batch.latents, batch.input_noise, timesteps)
    target = prediction_target(noise_scheduler, batch.latents, batch.noise, timesteps)
    if objective.dream_detail_preservation is not None:
        noisy_latents, target = dream(unet, objective, batch, noisy_latents, target)
    model_pred = predict(unet, noisy_latents, batch)
    # float(): half precision would lose small differences in the mean.
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return loss * snr_weights(noise_scheduler, timesteps, objective.snr_gamma)


def make_objective(args: argparse.Namespace, noise_scheduler: DDPMScheduler) -> Objective:
    """Raises UserError where the flags and what the model predicts do not go together."""
    kind = noise_scheduler.config.prediction_type
    if args.snr_gamma and kind == "sample":
        raise UserError("--snr_gamma weighs epsilon and v predictions; this model predicts the sample: leave it out")
    if args.dream_training and kind != "epsilon":
        raise UserError(f"--dream_training is made for epsilon prediction; this model predicts {kind}: leave it out")
    if noise_scheduler.config.rescale_betas_zero_snr and kind == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction: where only noise is left, epsilon says "
            "nothing about the picture"
        )
    return Objective(noise_scheduler, args.snr_gamma, args.dream_detail_preservation if args.dream_training else None)


def predict(unet: torch.nn.Module, noisy_latents: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(B, C, h, w) the UNet's prediction for noisy latents and the batch's conditions."""
    return unet(noisy_latents.to(batch.conditions.dtype), batch.timesteps, **batch.conditions.unet_inputs()).sample


def prediction_target(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """(B, C, h, w) what the scheduler's config says is predicted: the noise, v (arXiv:2202.00512), the latents."""
    kind = noise_scheduler.config.prediction_type
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return latents if kind == "sample" else noise


def dream(
    unet: torch.nn.Module, objective: Objective, batch: Batch, noisy_latents: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and target moved towards the UNet's own estimate (DREAM, arXiv:2312.00210).

    For epsilon: the UNet's own error, times λ = sqrt(1 - ᾱ)^p, is added to the noise. Costs a forward pass.
    """
    alpha_bar = objective.noise_scheduler.alphas_cumprod.to(noisy_latents.device)[batch.timesteps]
    sigma = (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        predicted_noise = predict(unet, noisy_latents, batch).float()
    error = sigma**objective.dream_detail_preservation * (batch.noise - predicted_noise)
    return noisy_latents + sigma * error, target + error


def snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """(B,) min-SNR-gamma weights (arXiv:2303.09556): min(SNR, γ) in units of the predicted quantity; None or 0: all 1.

    An error of the noise counts 1/SNR and an error of v counts 1/(SNR + 1) of the same error of the picture.
    The first is written as min(1, γ/SNR), which stays 1 where a zero terminal SNR would give 0/0. With such a schedule
    v's is min(SNR + 1, γ)/(SNR + 1): the plain form gives 0 to the last timestep, the one the schedule is made for.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = signal_to_noise(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        shift = 1.0 if noise_scheduler.config.rescale_betas_zero_snr else 0.0
        return (snr + shift).clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def signal_to_noise(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """(B,) signal power over noise power of the noised latents at `timesteps`."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod)
