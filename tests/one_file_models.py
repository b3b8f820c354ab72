"""Small models whose layers are built as Stable Diffusion's own are, so that one file shows all of what they are."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bases.families import SD1, SD2, XL
from bases.ldm_keys import StateDict, unet_to_ldm, vae_to_ldm
from bases.text_encoder_keys import text_encoder_to_ldm
from models.loading import load_text_encoder, load_unet, load_vae, save_vocabulary
from tiny_model import make_tokenizer, sd_scheduler
from unet_configs import SDXL

FAMILIES = {1: SD1, 2: SD2, "XL": XL}


def make_model(
    folder: Path, version: int, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32
) -> Path:
    """Stable Diffusion 1 or 2 in small: 32 groups, heads as there, pictures of 128 px."""
    torch.manual_seed(version)
    tokenizer = make_tokenizer(folder)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, sample_size=128,
        ),
        text_encoder=CLIPTextModel(_text_config(tokenizer, version)),
        tokenizer=tokenizer,
        unet=_unet(version),
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)
    save_vocabulary(tokenizer, folder / "tokenizer")
    return folder


def _text_config(tokenizer: CLIPTokenizer, version: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="gelu" if version == 2 else "quick_gelu",
    )  # fmt: skip


def _unet(version: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[1, 2] if version == 2 else 8, use_linear_projection=version == 2,
    )  # fmt: skip


def set_zero_snr(folder: Path) -> None:
    """As training with --rescale_betas_zero_snr leaves the scheduler."""
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("PNDMScheduler", "DDIMScheduler"))


def ldm_weights(folder: Path, version: int | str, dtype: torch.dtype = torch.float32) -> StateDict:
    """The weights of a folder under the names that a one-file checkpoint has."""
    weights = unet_to_ldm(load_unet(folder, dtype).state_dict()) | vae_to_ldm(load_vae(folder, dtype).state_dict())
    for encoder in FAMILIES[version].text_encoders:
        weights |= text_encoder_to_ldm(load_text_encoder(folder, encoder.part).to(dtype).state_dict(), encoder)
    return {name: weight.detach().clone().contiguous() for name, weight in weights.items()}


def as_ema(weights: StateDict) -> StateDict:
    """The UNet's weights under the names that Stable Diffusion's own code gives their average."""
    unet = {name: weight for name, weight in weights.items() if name.startswith("model.")}
    ema = {"model_ema." + name.removeprefix("model.").replace(".", ""): weight for name, weight in unet.items()}
    return copy.deepcopy(ema) | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def write_one_file(path: Path, weights: StateDict, metadata: dict[str, str] | None = None) -> Path:
    save_file(weights, path, {"format": "pt", **(metadata or {})})
    return path


def full_size_xl_weights() -> StateDict:
    """All weights in a file of Stable Diffusion XL, without data."""
    parts = full_size_xl_parts()
    weights = unet_to_ldm(parts["unet"].state_dict()) | vae_to_ldm(parts["vae"].state_dict())
    for encoder in XL.text_encoders:
        weights |= text_encoder_to_ldm(parts[encoder.part].state_dict(), encoder)
    return weights


def full_size_xl_parts() -> dict[str, torch.nn.Module]:
    """Stable Diffusion XL's own sizes, without data."""
    one = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    two = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280,
    )  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025,
        )  # fmt: skip
        texts = {"text_encoder": CLIPTextModel(one), "text_encoder_2": CLIPTextModelWithProjection(two)}
        return {"unet": UNet2DConditionModel(**SDXL), "vae": vae, **texts}
