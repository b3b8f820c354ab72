"""Folders of Stable Diffusion 1.x/2.x in diffusers' format: found, checked, described; no weight is loaded."""

import argparse
import hashlib
import json
import math
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.errors import UserError, advice_for, first_line, hub_error_reason
from runtime.paths import OUTPUTS

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
KNOWN_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # the third: diffusers' safety checker
_asked_variants: dict[Path, str] = {}  # of the folders that `find_model` was asked for one of
VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class ModelShape:
    """What the sizes of pictures follow from, read from the configs without loading a weight."""

    vae_factor: int  # pixels per latent cell, along each side
    unet_levels: int
    latent_channels: int
    native_size: int  # pixels, along each side
    attention_levels: tuple[int, ...]  # the UNet levels that have attention; level i works at 1 / 2**i of the latent

    @property
    def size_multiple(self) -> int:
        """A side in pixels must be a multiple of this: the UNet halves the latent at each level, and diffusers'
        pipeline accepts multiples of 8 only."""
        return max(8, self.vae_factor * 2 ** (self.unet_levels - 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor


def find_model(
    name: str, flag: str, revision=None, variant=None, cache_dir=None, pickles_to: Path | None = None
) -> Path:
    """The folder of a model: `name` itself when it is one, else downloaded from the hub.

    Weights must be safetensors; pickles are refused, or converted into a folder below `pickles_to` where it is given.
    Of the parts that have weights of `variant` these are loaded from here on, of the others the plain ones.
    Raises UserError that names `flag` when there is no such model, or it is not a Stable Diffusion pipeline.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(
            f"{flag} {name}: a file; a folder in diffusers' format is needed, which diffusers makes of a one-file "
            "checkpoint: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if not folder.is_dir():
        folder = _download(name, flag, revision, variant, cache_dir, use_safetensors=None if pickles_to else True)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{flag} {name}: the folder has no model_index.json, so it is not a diffusers pipeline")
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise UserError(
            f"{flag} {name}: the folder has no {', '.join(missing)}/; a Stable Diffusion pipeline is needed"
        )
    parts = _checked_parts(folder, f"{flag} {name}")
    if pickles := [path for part in parts if not _weights(folder, part) for path in _pickles(folder, part)]:
        if pickles_to is None:
            raise UserError(
                f"{flag} {name}: {shown_part(pickles[0])} is a pickle, which can run code when it is read; take a "
                "model with safetensors, or, where you trust its maker, let training convert it with --allow_pickle"
            )
        folder = convert_pickles(folder, pickles, pickles_to)
    _asked_variants.pop(folder, None)
    if variant:
        if variant not in (there := _variants(folder, "unet")):
            has = ", ".join(sorted(one or "plain weights" for one in there))
            raise UserError(f"--variant {variant}: the UNet of {name} has no such weights; it has {has}")
        _asked_variants[folder] = variant
    return folder


def _checked_parts(folder: Path, what: str) -> list[str]:
    """The folders of the pipeline's parts; UserError where one is code that comes with it: such code is never run."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        libraries = {part: value[0] for part, value in index.items() if isinstance(value, list)}
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{what}: model_index.json cannot be read ({first_line(error)})") from None
    for part, library in libraries.items():
        if library not in KNOWN_LIBRARIES:
            raise UserError(f"{what}: its {part} is code of its own ({library!r}), which is never run here")
    return [part for part in sorted(libraries) if (folder / part).is_dir()]


def _pickles(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in (folder / part).iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))


def shown_part(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def convert_pickles(folder: Path, pickles: Sequence[Path], to: Path) -> Path:
    """A copy of the model with safetensors in place of `pickles`; once, under a name that follows from their bytes and
    those of the configs.

    They are read as weights alone, so that what else is in them is an error and not run.
    """
    told = [*pickles, *sorted(folder.rglob("*.json"))]
    content = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in told)).hexdigest()
    whole = to / f"{folder.name}-{content[:8]}"
    if whole.is_dir():
        return whole
    to.mkdir(parents=True, exist_ok=True)
    part, names = Path(tempfile.mkdtemp(dir=to, prefix=".")), {path.name for path in pickles}
    shutil.copytree(folder, part, dirs_exist_ok=True, ignore=lambda _, found: [n for n in found if n in names])
    for path in pickles:
        stem = path.stem if path.stem.startswith("diffusion_") else path.stem.replace("pytorch_model", "model")
        with loading_errors(folder, path.parent.name):
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(weights, part / path.parent.name / f"{stem}.safetensors", {"format": "pt"})
    try:
        part.rename(whole)  # at last, so that a folder of this name is whole
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return whole


def _download(name: str, flag: str, revision, variant, cache_dir, use_safetensors: bool | None) -> Path:
    try:
        return Path(
            DiffusionPipeline.download(
                name, use_safetensors=use_safetensors, revision=revision, variant=variant, cache_dir=cache_dir
            )
        )
    except Exception as error:  # the hub's errors have no common class (OSError, ValueError, requests' and httpx's)
        raise UserError(
            f"{flag} {name}: no such folder, and not to be had from the Hugging Face hub: {hub_error_reason(error)}"
        ) from None


def read_shape(folder: Path) -> ModelShape:
    """UserError where a config is missing or lacks what a Stable Diffusion model has."""
    try:
        vae, unet = (json.loads((folder / part / "config.json").read_text()) for part in ("vae", "unet"))
        if unet["in_channels"] != vae["latent_channels"] or unet.get("addition_embed_type"):
            raise UserError(f"{folder}: not of Stable Diffusion 1.x or 2.x text-to-image's kind (inpainting, XL, ...)")
        sample_size = unet["sample_size"]
        vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        return ModelShape(
            vae_factor=vae_factor,
            unet_levels=len(unet["block_out_channels"]),
            latent_channels=unet["in_channels"],
            native_size=(sample_size if isinstance(sample_size, int) else max(sample_size)) * vae_factor,
            attention_levels=tuple(i for i, kind in enumerate(unet["down_block_types"]) if "Attn" in kind),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion pipeline ({type(error).__name__}: {error})") from None


def variant_of(folder: Path, part: str) -> str | None:
    """Which of a part's weights are loaded: 'fp16' for `*.fp16.safetensors`, None for those of the plain name.

    The variant that was asked for where it is there, else the plain ones, else what there is.
    """
    variants = _variants(folder, part)
    if (asked := _asked_variants.get(folder)) in variants:
        return asked
    return None if None in variants else min(variants, default=None)


def _variants(folder: Path, part: str) -> set[str | None]:
    return {match[1] if (match := VARIANT.search(path.name)) else None for path in _weights(folder, part)}


def _weights(folder: Path, part: str) -> list[Path]:
    return sorted((folder / part).glob("*.safetensors"))


def _own_weights(folder: Path, part: str) -> list[Path]:
    """Those that are loaded, where several variants lie beside each other."""
    variant = variant_of(folder, part)
    found = [(path, VARIANT.search(path.name)) for path in _weights(folder, part)]
    return [path for path, match in found if (match[1] if match else None) == variant]


def _settings(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in (folder / part).iterdir() if path.suffix in (".json", ".txt"))


def count_parameters(folder: Path, part: str = "unet") -> int:
    """How many numbers a part's weights are, from the heads of its safetensors files."""
    heads = map(_safetensors_head, _own_weights(folder, part))
    return sum(math.prod(tensor["shape"]) for head in heads for name, tensor in head.items() if name != "__metadata__")


def count_lora_parameters(folder: Path, rank: int, targets: Sequence[str]) -> int:
    """How many numbers a LoRA of this rank beside the UNet's `targets` is."""
    endings = tuple(f"{target}.weight" for target in targets)
    heads = map(_safetensors_head, _own_weights(folder, "unet"))
    shapes = [tensor["shape"] for head in heads for name, tensor in head.items() if name.endswith(endings)]
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def _safetensors_head(path: Path) -> dict:
    with loading_errors(path.parent.parent, path.parent.name), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file (without Git LFS, a clone has a note in its place)")
        return json.loads(file.read(length))


def fingerprint_model(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """A hash of the parts' configs and weights. Of each weights file the size, head and tail: reading all would cost
    seconds per GB, and fine-tuning changes every tensor."""
    digest = hashlib.sha256()
    for part in parts:
        for path in [*_settings(folder, part), *_own_weights(folder, part)]:
            digest.update(f"{part}/{path.name} {path.stat().st_size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, path.stat().st_size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()


def fingerprint_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def loading_errors(folder: Path, part: str) -> Iterator[None]:
    """Whatever a library raises while it loads `part` becomes a UserError that names it, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        if advice_for(error):  # a full disk or memory is no fault of the model
            raise
        raise UserError(f"{folder}: its {part} cannot be loaded: {first_line(error)}") from None


def find_bases(args: argparse.Namespace) -> tuple[Path, Path]:
    """The base model, and where its UNet is taken from."""
    where = (args.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    pickles_to = OUTPUTS / "converted" if args.allow_pickle else None
    base = find_model(*where, args.revision, args.variant, args.cache_dir, pickles_to)
    if args.non_ema_revision is None:
        return base, base
    return base, find_model(*where, args.non_ema_revision, args.variant, args.cache_dir, pickles_to)
