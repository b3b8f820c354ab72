"""Model folders in diffusers' format, described from configs and file headers: no weights are loaded."""

import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import UserError, advice_for, first_line

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
HASHED_BYTES = 1 << 20  # at the head and at the tail of a weights file


@dataclass(frozen=True)
class ModelFolder(os.PathLike[str]):
    """A pipeline's folder, and the variant of its weights that was asked for (--variant).

    It can be used as a path where the variant does not matter: `model / "unet"`, `str(model)`, `Path(model)`.
    """

    path: Path
    variant: str | None = None  # 'fp16' for `*.fp16.safetensors`

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.name


FolderLike = Path | ModelFolder  # of a plain path the plain weights are read, or the only ones there are


@dataclass(frozen=True)
class ModelShape:
    """What determines the sizes of images and latents, from the configs of the UNet and the VAE."""

    vae_factor: int  # pixels per latent cell, along each side
    unet_levels: int
    latent_channels: int
    native_size: int  # pixels, along each side
    attention_levels: tuple[int, ...]  # the UNet levels that have attention; level i works at 1 / 2**i of the latent

    @property
    def size_multiple(self) -> int:
        """Image sides in pixels must be multiples of this.

        The UNet halves the latent at each level, and diffusers' pipeline accepts multiples of 8 only.
        """
        return max(8, self.vae_factor * 2 ** (self.unet_levels - 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of `height` x `width` pixels."""
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor


def read_shape(folder: FolderLike) -> ModelShape:
    """Raises UserError if a config is missing or is not that of a Stable Diffusion 1.x or 2.x model."""
    try:
        vae, unet = (json.loads((folder / part / "config.json").read_text()) for part in ("vae", "unet"))
        if unet["in_channels"] != vae["latent_channels"] or unet.get("addition_embed_type"):
            raise UserError(
                f"{folder}: not a text-to-image model of Stable Diffusion 1.x or 2.x (inpainting, XL or another kind)"
            )
        sample_size = unet["sample_size"]
        vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return ModelShape(
            vae_factor=vae_factor,
            unet_levels=len(unet["block_out_channels"]),
            latent_channels=unet["in_channels"],
            native_size=(sample_size if isinstance(sample_size, int) else max(sample_size)) * vae_factor,
            attention_levels=tuple(i for i, block in enumerate(unet["down_block_types"]) if "Attn" in block),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion pipeline ({type(error).__name__}: {error})") from None


def choose_variant(folder: FolderLike, part: str) -> str | None:
    """Which weights of a part are read: 'fp16' for `*.fp16.safetensors`, None for the plain file names.

    The variant that was asked for if the part has it, else the plain weights, else whatever there is.
    """
    available = list_variants(folder, part)
    if isinstance(folder, ModelFolder) and folder.variant in available:
        return folder.variant
    return None if None in available else min((name for name in available if name), default=None)


def list_variants(folder: FolderLike, part: str) -> set[str | None]:
    """The variants that a part has safetensors files of; None stands for plain file names."""
    return {_variant_of(path) for path in list_weights(folder, part)}


def list_weights(folder: FolderLike, part: str) -> list[Path]:
    """All safetensors files of a part, of every variant."""
    return sorted((folder / part).glob("*.safetensors"))


def _weights_read(folder: FolderLike, part: str) -> list[Path]:
    """The safetensors files of a part that are loaded."""
    variant = choose_variant(folder, part)
    return [path for path in list_weights(folder, part) if _variant_of(path) == variant]


def _variant_of(path: Path) -> str | None:
    match = VARIANT.search(path.name)
    return match[1] if match else None


def count_parameters(folder: FolderLike, part: str = "unet") -> int:
    """The number of parameters of a part, from the headers of its safetensors files."""
    return sum(map(math.prod, read_weight_shapes(folder, part).values()))


def count_lora_parameters(folder: FolderLike, rank: int, targets: Sequence[str]) -> int:
    """The number of parameters of a LoRA of this rank on the UNet's layers whose names end in one of `targets`."""
    endings = tuple(f"{target}.weight" for target in targets)
    headers = map(_safetensors_header, _weights_read(folder, "unet"))
    shapes = [tensor["shape"] for header in headers for name, tensor in header.items() if name.endswith(endings)]
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def read_weight_shapes(folder: FolderLike, part: str) -> dict[str, tuple[int, ...]]:
    """{name of each weight of a part: its shape}, from the headers of its safetensors files."""
    headers = map(_safetensors_header, _weights_read(folder, part))
    return {
        name: tuple(tensor["shape"]) for header in headers for name, tensor in header.items() if name != "__metadata__"
    }


def _safetensors_header(path: Path) -> dict[str, dict]:
    with loading_errors(path.parent.parent, path.parent.name), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file (a clone without Git LFS has a note instead)")
        return json.loads(file.read(length))


def fingerprint_model(folder: FolderLike, parts: Sequence[str] = PARTS) -> str:
    """A SHA-256 over the parts' configs and weights: 64 hex digits.

    Of a weights file the size and one MB at each end count. Reading all of it would cost seconds per GB, and
    fine-tuning changes every tensor.
    """
    digest = hashlib.sha256()
    for part in parts:
        for path in [*_config_files(folder, part), *_weights_read(folder, part)]:
            digest.update(f"{part}/{path.name} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(HASHED_BYTES))
                file.seek(max(0, path.stat().st_size - HASHED_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def _config_files(folder: FolderLike, part: str) -> list[Path]:
    return sorted(path for path in (folder / part).iterdir() if path.suffix in (".json", ".txt"))


def fingerprint_file(path: Path) -> str:
    """The SHA-256 of a whole file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def loading_errors(folder: FolderLike, part: str) -> Iterator[None]:
    """Turns what a library raises while it loads `part` into a one-line UserError that names folder and part."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        if advice_for(error):  # a full disk or memory is not the model's fault
            raise
        raise UserError(f"{folder}: its {part} cannot be loaded: {first_line(error)}") from None
