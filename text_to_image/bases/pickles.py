"""Converts models whose weights are pickles (`*.bin`, `*.ckpt`) to safetensors, without running code in them."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.folders import loading_errors
from runtime.files import atomic_folder

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def list_pickles(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in (folder / part).iterdir() if path.suffix in PICKLE_SUFFIXES)


def convert_pickles(folder: Path, pickles: Sequence[Path], to: Path) -> Path:
    """A copy of the model below `to`, with safetensors files instead of `pickles`.

    Its name follows from the content of pickles and configs, so a model is converted only once. A pickle that holds
    more than tensors raises UserError.
    """
    converted = to / f"{folder.name}-{_hash_content(folder, pickles)[:8]}"
    if converted.is_dir():
        return converted
    names = {path.name for path in pickles}
    with atomic_folder(converted) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=lambda _, found: [n for n in found if n in names])
        for path in pickles:
            _convert(path, folder, partial / path.parent.name)
    return converted


def _hash_content(folder: Path, pickles: Sequence[Path]) -> str:
    files = [*pickles, *sorted(folder.rglob("*.json"))]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def _convert(path: Path, folder: Path, to: Path) -> None:
    """pytorch_model.bin → model.safetensors, diffusion_pytorch_model.bin → diffusion_pytorch_model.safetensors."""
    stem = path.stem if path.stem.startswith("diffusion_") else path.stem.replace("pytorch_model", "model")
    with loading_errors(folder, path.parent.name):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, to / f"{stem}.safetensors", {"format": "pt"})
