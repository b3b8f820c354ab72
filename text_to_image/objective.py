"""What is learned: the noised latents, the target that the UNet is to predict, and the weight of each timestep."""

import torch
import torch.nn.functional as F

from batches import Batch


def diffusion_loss(unet, noise_scheduler, batch: Batch, snr_gamma: float | None) -> torch.Tensor:
    """(B,) the loss of each sample: weighted mean squared error of the UNet's prediction (DDPM, arXiv:2006.11239)."""
    latents, noise, timesteps = batch.latents, batch.noise, batch.timesteps
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(
        noisy_latents,
        timesteps,
        batch.encoder_hidden_states,
        encoder_attention_mask=batch.encoder_attention_mask,
    ).sample
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    # float(): half precision would lose small differences in the mean.
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return loss * snr_weights(noise_scheduler, timesteps, snr_gamma)


def prediction_target(noise_scheduler, latents, noise, timesteps) -> torch.Tensor:
    """(B, 4, h, w) what the scheduler's config says the UNet predicts: the noise, or v (arXiv:2202.00512)."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise


def snr_weights(noise_scheduler, timesteps, gamma: float | None) -> torch.Tensor:
    """(B,) min-SNR-gamma weights (arXiv:2303.09556): min(SNR, γ) in units of the predicted quantity; None or 0: all 1.

    An error of the noise counts 1/SNR and an error of v counts 1/(SNR + 1) of the same error of the picture.
    The first is written as min(1, γ/SNR), which stays 1 where a zero terminal SNR would give 0/0.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = signal_to_noise(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def signal_to_noise(noise_scheduler, timesteps) -> torch.Tensor:
    """(B,) signal power over noise power of the noised latents at `timesteps`."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod)
