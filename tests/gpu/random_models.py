"""Models and pictures to measure with: Stable Diffusion 1.5's size with random weights, or a tiny one; made once."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu.settings import Settings

# Of Stable Diffusion 1.5's UNet at 512 px, a sample, forward and backward, by torch.utils.flop_counter: convolutions
# and projections, 0.677 forward and twice that backward. Attention's own products, 0.38 more, are left out as usual.
TFLOP_PER_SAMPLE = 2.03
PICTURES = 32
CAPTIONS = ("a pair of denim jeans laid flat on white", "the red t shirt on white")


def model_folder(settings: Settings) -> Path:
    """A pipeline in fp16, as models are usually kept."""
    folder = settings.work / ("tiny" if settings.tiny else "sd15")
    if not folder.is_dir():
        partial = settings.work / "partial model"
        shutil.rmtree(partial, ignore_errors=True)
        _make_tiny(partial) if settings.tiny else _make_full_size(partial)
        partial.rename(folder)
    return folder


def _make_tiny(folder: Path) -> None:
    from tiny_model import make_tiny_model

    make_tiny_model(folder, dtype=torch.float16)


def _make_full_size(folder: Path) -> None:
    """Made on the GPU, where a billion random numbers take a moment; on the CPU where that fails."""
    try:
        pipeline = _random_pipeline("cuda")
    except Exception as error:
        print(f"the model is made on the CPU: {error}", flush=True)
        pipeline = _random_pipeline("cpu")
    pipeline.to("cpu").save_pretrained(folder, safe_serialization=True)
    del pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _random_pipeline(device: str):
    """SD 1.5's layer sizes (UNet of 859.5 M parameters) with random weights, in fp16."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from runtime.paths import STARTER
    from tiny_model import sd_scheduler

    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device(device), _default_dtype(torch.float16):
        vae, text_encoder = _full_size_vae(), CLIPTextModel(text)
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(STARTER / "tokenizer"),
        unet=unet,
        scheduler=sd_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _full_size_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )


def picture_folder(settings: Settings, captions: tuple[str, ...] = CAPTIONS, count: int = PICTURES) -> Path:
    """A captioned folder of random squares, the captions in turn. There are PICTURES of them; more are links to those.

    Other captions, or another count, make another folder.
    """
    from PIL import Image

    folder = settings.work / f"pictures-{count}-{max(map(len, captions))}"
    if folder.is_dir():
        return folder
    partial = settings.work / "partial pictures"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(min(count, PICTURES)):
        coarse = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(coarse).resize((settings.resolution,) * 2).save(partial / f"{i:03d}.png")
    for i in range(PICTURES, count):
        os.link(partial / f"{i % PICTURES:03d}.png", partial / f"{i:03d}.png")
    rows = [{"file_name": f"{i:03d}.png", "text": captions[i % len(captions)]} for i in range(count)]
    (partial / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial.rename(folder)
