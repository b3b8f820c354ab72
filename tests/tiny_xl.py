"""Stable Diffusion XL in small, in the file layout of the real one: two text encoders, sizes and crops as conditions.

python tests/tiny_xl.py FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.loading import save_vocabulary
from tiny_model import make_tokenizer

POOLED, TIME_DIM = 96, 32  # numbers of the second encoder's pooled output; of each of the six time ids


def make_xl_model(folder: Path, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Path:
    """Pictures of 64 px, VAE factor 2, three UNet levels; 32 groups and 64 numbers a head, as in the real one."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder)
    pipeline = StableDiffusionXLPipeline(
        vae=xl_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 64, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 128, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer(folder),
        unet=xl_unet(),
        scheduler=xl_scheduler(prediction_type),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        save_vocabulary(getattr(pipeline, name), folder / name)
    return folder


def second_tokenizer(folder: Path) -> CLIPTokenizer:
    """That of `folder`/tokenizer, but for what it pads with: '!', whose id is 0, as OpenCLIP does."""
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "!"}))
    return CLIPTokenizer.from_pretrained(config.parent)


def xl_vae() -> AutoencoderKL:
    """Random, but with latents like a trained one's: about unit variance, a narrow posterior."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025,
    )
    vae.quant_conv.weight.data[:4] *= 40
    vae.post_quant_conv.weight.data /= 40
    vae.quant_conv.bias.data[4:] = -8.0  # the log-variance half
    return vae


def xl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=64 + 128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_DIM,
    )


def xl_scheduler(prediction_type: str) -> EulerDiscreteScheduler:
    """XL's own schedule and class."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text_to_image"))
    make_xl_model(Path(sys.argv[1]))
