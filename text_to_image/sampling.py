"""From noise to pictures: DPM-Solver++ 2M with Karras' noise levels and classifier-free guidance."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from model_folders import loading
from prompts import join_embeddings

SAMPLER = "DPM++ 2M Karras"


def load_sampler(
    folder: Path, prediction_type: str | None = None, zero_snr: bool = False
) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (arXiv:2211.01095) on the model's own schedule, with the noise levels of arXiv:2206.00364."""
    settings = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True}
    settings |= {"prediction_type": prediction_type} if prediction_type else {}
    settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    with loading(folder, "scheduler"):
        return DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler", **settings)


def initial_noise(seed: int, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """(C, h, w), drawn on the CPU for one picture: its batch and the device change nothing."""
    return torch.randn((1, *latent_shape), generator=torch.Generator().manual_seed(seed))[0]


@torch.no_grad()
def draw_latents(
    unet,
    sampler: DPMSolverMultistepScheduler,
    noise: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    negative: torch.Tensor,
    guidance_scale: float,
    steps: int,
) -> torch.Tensor:
    """(B, C, h, w) latents from as much noise and B prompt embeddings (L_i, D), steered away from `negative` (L, D).

    A guidance scale of 1 or less takes the prediction for the prompt alone, at half the cost.
    """
    guided = guidance_scale > 1
    texts = [negative] * len(prompts) + list(prompts) if guided else list(prompts)
    hidden_states, mask = join_embeddings([text.to(unet.device, unet.dtype) for text in texts])
    sampler.set_timesteps(steps, device=unet.device)
    latents = noise.to(unet.device) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, t).to(unet.dtype)
        model_input = torch.cat([scaled, scaled]) if guided else scaled
        model_pred = unet(model_input, t, hidden_states, encoder_attention_mask=mask).sample.float()
        if guided:
            away, towards = model_pred.chunk(2)
            model_pred = away + guidance_scale * (towards - away)
        latents = sampler.step(model_pred, t, latents).prev_sample
    return latents


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents (B, C, h, w); one at a time, since decoding takes more memory than all the steps before."""
    return [
        _to_image(vae.decode(latent[None].to(vae.dtype) / vae.config.scaling_factor).sample[0]) for latent in latents
    ]


def _to_image(pixel_values: torch.Tensor) -> Image.Image:
    pixels = (pixel_values / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
