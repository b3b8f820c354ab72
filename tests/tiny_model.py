"""A Stable Diffusion pipeline of a few thousand random parameters, in the file layout of the real ones.

python tests/tiny_model.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.loading import save_vocabulary

WORDS = ["a", "the", "pair", "of", "denim", "jeans", "on", "white", "red", "t", "shirt", "flat", "laid"]
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def make_tiny_model(
    folder: Path, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A pipeline whose pictures are 64 px, VAE factor 2, two UNet levels; it keeps texts of the words above short."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)
    save_vocabulary(tokenizer, folder / "tokenizer")
    return folder


def tiny_vae() -> AutoencoderKL:
    """Random, but with latents like a trained one's: about unit variance, a narrow posterior."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
        scaling_factor=5.0,
    )
    vae.quant_conv.bias.data[4:] = -8.0  # the log-variance half
    return vae


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def sd_scheduler(prediction_type: str) -> PNDMScheduler:
    """Stable Diffusion's own schedule and class."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


def add_safety_checker(folder: Path) -> None:
    """Gives the model a safety checker, whose threshold makes it flag every picture."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**size, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    config = CLIPConfig(text_config={**size, "vocab_size": 16}, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of all bytes and a few words."""
    merges, vocabulary = _vocabulary()
    files = folder / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    (files / "vocab.json").write_text(json.dumps(vocabulary))
    (files / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": SPECIAL[1]}
    (files / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(files)


def _vocabulary() -> tuple[list[str], dict[str, int]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[str, None] = {}
    for word in WORDS:
        start, *rest = [*word[:-1], word[-1] + "</w>"]
        for letter in rest:
            merges[f"{start} {letter}"] = None
            start += letter
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
        *SPECIAL,
    ]
    return list(merges), {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text_to_image"))
    make_tiny_model(Path(sys.argv[1]))
