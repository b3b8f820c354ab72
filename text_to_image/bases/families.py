"""Stable Diffusion 1.x, 2.x and XL: all in which their one-file checkpoints, and what is made of them, differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bases.text_encoder_keys import TextEncoderFormat


@dataclass(frozen=True)
class SchedulerFormat:
    """diffusers' class, and what its config has beside the betas."""

    class_name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one architecture, and what the weights do not show."""

    name: str
    text_encoders: tuple[TextEncoderFormat, ...]
    pipeline: str  # diffusers' class
    latent_size: int  # of pictures of the native size, along each side
    velocity_latent_size: int  # the same of a model that predicts velocity
    vae_scale: float
    unet_heads: int | None  # of every layer; None: as many as have 64 numbers each
    scheduler: SchedulerFormat
    zero_snr_scheduler: SchedulerFormat
    states_prediction: bool = False  # whether a file must say what it predicts, as both kinds are common
    has_size_conditions: bool = False  # whether the UNet is also given pooled text, and sizes of picture and crop
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline, in model_index.json


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
PNDM, DDIM = SchedulerFormat("PNDMScheduler", {"skip_prk_steps": True}), SchedulerFormat("DDIMScheduler", ZERO_SNR)
EULER = SchedulerFormat("EulerDiscreteScheduler", {"timestep_spacing": "leading"})

SD1 = Family(
    name="Stable Diffusion 1.x",
    text_encoders=(
        TextEncoderFormat(
            part="text_encoder",
            prefixes=("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
            open_clip=False,
        ),
    ),
    pipeline="StableDiffusionPipeline",
    latent_size=64,
    velocity_latent_size=64,
    vae_scale=0.18215,
    unet_heads=8,
    scheduler=PNDM,
    zero_snr_scheduler=DDIM,  # PNDM has no such schedule
    settings={"requires_safety_checker": False, "safety_checker": [None, None]},
)
SD2 = Family(
    name="Stable Diffusion 2.x",
    text_encoders=(
        TextEncoderFormat(
            part="text_encoder", prefixes=("cond_stage_model.model.",), open_clip=True, unused_layer=23, padding="!"
        ),
    ),
    pipeline="StableDiffusionPipeline",
    latent_size=64,
    velocity_latent_size=96,
    vae_scale=0.18215,
    unet_heads=None,
    scheduler=PNDM,
    zero_snr_scheduler=DDIM,
    states_prediction=True,
    settings={"requires_safety_checker": False, "safety_checker": [None, None]},
)
XL = Family(
    name="Stable Diffusion XL",
    text_encoders=(
        TextEncoderFormat(
            part="text_encoder",
            prefixes=(
                "conditioner.embedders.0.transformer.text_model.",
                "conditioner.embedders.0.transformer.",
            ),
            open_clip=False,
        ),
        TextEncoderFormat(
            part="text_encoder_2",
            prefixes=("conditioner.embedders.1.model.",),
            open_clip=True,
            has_projection=True,
            padding="!",
        ),
    ),
    pipeline="StableDiffusionXLPipeline",
    latent_size=128,
    velocity_latent_size=128,
    vae_scale=0.13025,
    unet_heads=None,
    scheduler=EULER,
    zero_snr_scheduler=SchedulerFormat("EulerDiscreteScheduler", ZERO_SNR),
    has_size_conditions=True,
    settings={"force_zeros_for_empty_prompt": True, "image_encoder": [None, None]},
)
FAMILIES = (SD1, SD2, XL)


def family_of_folder(text_configs: Mapping[str, Mapping[str, Any]]) -> Family:
    """By {part: config.json} of a folder's text encoders: XL has two; OpenAI's CLIP, of 1.x, alone has quick_gelu."""
    if "text_encoder_2" in text_configs:
        return XL
    return SD1 if text_configs["text_encoder"].get("hidden_act", "quick_gelu") == "quick_gelu" else SD2


def family_of_file(names: Iterable[str]) -> Family:
    """By the names of the weights in a file; 1.x where there is no text encoder that is known here."""
    names = tuple(names)
    found = (
        family
        for family in FAMILIES
        if any(name.startswith(e.prefixes) for e in family.text_encoders for name in names)
    )
    return next(found, SD1)
