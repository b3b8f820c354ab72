"""What a training run left in its folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["train_loss"] for row in rows(folder)]


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")
