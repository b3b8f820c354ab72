"""Small safetensors files with a checksum in their head, for what can be made again: written whole, damage is seen."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from runtime.errors import InputChanged, first_line
from runtime.files import atomic_write


def save_with_checksum(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, durable=False) as partial:  # its checksum shows what a crash left of it
        save_file(tensors, partial, {"checksum": _checksum(tensors)})


def is_intact(path: Path) -> bool:
    """Whether the file is there and undamaged."""
    try:
        content = path.read_bytes()
        with safe_open(path, "pt") as file:
            return _checksum(load(content)) == (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return False


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of the file. Raises InputChanged where it cannot be read any more."""
    return read_tensors(path, name)[0]


def read_tensors(path: Path, *names: str) -> list[torch.Tensor]:
    """Tensors of the file. Raises InputChanged where they cannot be read any more."""
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(name) for name in names]
    except FileNotFoundError:
        fault = "no such file any more"
    except (OSError, SafetensorError) as error:
        fault = f"cannot be read any more ({first_line(error)})"
    raise InputChanged(f"{path}: {fault}; the same command makes it again and goes on")


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
