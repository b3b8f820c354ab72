"""Stable Diffusion 1.x/2.x: loaded part by part, and saved as a whole pipeline."""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import CLIPTextModel, CLIPTokenizer

from models.defaults import GENERATION_DEFAULTS, TRAINING_DEFAULTS
from models.folders import ModelShape, loading_errors, variant_of
from runtime.devices import convolution_memory_format
from runtime.errors import UserError

CARRIED_FORWARD = ("LICENSE*", "LICENCE*", TRAINING_DEFAULTS, GENERATION_DEFAULTS)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN_ATTENTION_MAX_TOKENS = 2048


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and remarks out of the scripts' output; their errors and downloads still show."""
    unwanted = are_progress_bars_disabled()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not unwanted:
        enable_progress_bars()  # transformers has disabled the hub's with its own; some wait minutes for gigabytes


def load_unet(folder: Path, dtype=torch.float32, subfolder: str = "unet") -> UNet2DConditionModel:
    """With weights laid out as the device likes them."""
    with loading_errors(folder, subfolder):
        unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder=subfolder, use_safetensors=True, variant=variant_of(folder, subfolder)
        )
        # .to(): the libraries' versions name the dtype argument differently and differ in what they do without it.
        return unet.to(dtype, memory_format=convolution_memory_format())


def load_vae(folder: Path, dtype=torch.float32) -> AutoencoderKL:
    with loading_errors(folder, "vae"):
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", use_safetensors=True, variant=variant_of(folder, "vae")
        )
    return vae.to(dtype).eval()


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer, its model_max_length what the text encoder really reads (77 for CLIP)."""
    with loading_errors(folder, "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        positions = json.loads((folder / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_text_encoder(folder: Path, dtype=torch.float32) -> CLIPTextModel:
    with loading_errors(folder, "text_encoder"):
        text_encoder = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", use_safetensors=True, variant=variant_of(folder, "text_encoder")
        )
    return text_encoder.to(dtype).eval()


def load_noise_scheduler(folder: Path, prediction_type: str | None = None, zero_snr: bool = False) -> DDPMScheduler:
    """The forward process of the model's own schedule; `prediction_type` overrides what its config says.

    `zero_snr` rescales it to end in pure noise (arXiv:2305.08891).
    """
    changes = {"rescale_betas_zero_snr": True} if zero_snr else {}
    changes |= {"prediction_type": prediction_type} if prediction_type else {}
    with loading_errors(folder, "scheduler"):
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **changes)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{folder}: prediction type {scheduler.config.prediction_type!r} cannot be trained here")
    return scheduler


def choose_attention(unet: UNet2DConditionModel, shape: ModelShape, height: int, width: int, device: str) -> None:
    """Plain attention on the CPU, where the fused kind's backward is slow at small sizes (a step takes 1.3 times as
    long); fused on GPUs and for larger pictures, whose score matrices would fill the memory."""
    _, h, w = shape.latent_shape(height, width)
    tokens = max((h >> level) * (w >> level) for level in shape.attention_levels or (0,))
    if device == "cpu" and tokens <= PLAIN_ATTENTION_MAX_TOKENS:
        unet.set_attn_processor(AttnProcessor())


def save_pipeline(unet: UNet2DConditionModel, base: Path, output: Path, noise_scheduler: DDPMScheduler) -> None:
    """Writes the whole pipeline, `base` with another UNet, in fp32 throughout: plain diffusers cannot run mixed ones.

    What else `base` has stays as it is (SD 1.x's safety checker, the scheduler's class), licence and defaults too.
    """
    with loading_errors(base, "pipeline"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            base, unet=unet, vae=load_vae(base), text_encoder=load_text_encoder(base), use_safetensors=True,
            variant=variant_of(base, "unet"),
        ).to(torch.float32)  # fmt: skip
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, noise_scheduler)
    pipeline.save_pretrained(output, safe_serialization=True)
    save_vocabulary(pipeline.tokenizer, output / "tokenizer")
    copy_license_and_defaults(base, output)


def copy_license_and_defaults(base: Path, output: Path) -> None:
    """The base's licence and defaults, for what was made from it."""
    for pattern in CARRIED_FORWARD:
        for path in base.glob(pattern):
            shutil.copyfile(path, output / path.name)


def sampling_scheduler(own, noise_scheduler: DDPMScheduler):
    """The model's own scheduler, told what was trained; a schedule that ends in pure noise is sampled from its end."""
    own.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    if not noise_scheduler.config.rescale_betas_zero_snr:
        return own
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    if "rescale_betas_zero_snr" in own.config:
        return own.from_config(own.config, **changed)
    return DDIMScheduler.from_config(own.config, **changed)  # PNDM, SD 1.x's own, knows no such schedule


def save_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 5 writes only the latter."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
