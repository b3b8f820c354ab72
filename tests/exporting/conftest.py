"""A tiny model with what Stable Diffusion 2 does differently."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.loading import save_vocabulary
from tiny_model import make_tokenizer, sd_scheduler, tiny_vae


@pytest.fixture(scope="session")
def sd2_model(tmp_path_factory) -> Path:
    """OpenCLIP, v prediction, linear projections, heads by level, two layers a block."""
    folder = tmp_path_factory.mktemp("model") / "sd2"
    torch.manual_seed(1)
    tokenizer = make_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        hidden_act="gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(8, 16, 32), layers_per_block=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4, 8], use_linear_projection=True, norm_num_groups=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=sd_scheduler("v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_vocabulary(tokenizer, folder / "tokenizer")
    return folder
