"""Model folders in diffusers' format, described from configs and file headers: no weights are loaded."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from runtime.errors import UserError, WorkError, advice_for, first_line

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
XL_PARTS = ("text_encoder_2", "tokenizer_2")  # beside PARTS
XL_EMBEDDING = "text_time"  # of pooled text and of sizes, which XL's UNet adds to that of the timestep
TIME_IDS = 6  # what XL is told of size and crop; its refiner takes 5 numbers
VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
EXTRAS = {"safety_checker": "config.json", "feature_extractor": "preprocessor_config.json"}  # of SD 1.x; their configs
INDEX_FILE = "model_index.json"
SHAPE_KEYS: dict[str, dict[str, Any]] = {  # of a part's config.json, with their types
    "unet": {"in_channels": int, "sample_size": int | list, "block_out_channels": list, "down_block_types": list},
    "vae": {"latent_channels": int, "block_out_channels": list},
}
NAMES_SHOWN = 5  # of weights that are refused
HASHED_BYTES = 1 << 20  # at the head and at the tail of a weights file
# What a UNet may ask for beside noisy latents, timestep and text, by the key of its config.
OTHER_CONDITIONS = {
    "class_embed_type": "class or image embeddings, as unCLIP does",
    "num_class_embeds": "class labels, as an upscaler's noise levels",
    "addition_embed_type": "added embeddings of another kind than XL's",
    "encoder_hid_dim_type": "embeddings of pictures or of another text encoder",
    "time_cond_proj_dim": "the guidance scale, as LCM does",
}


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
    """Raises UserError if a config is missing or is not that of a Stable Diffusion model: 1.x, 2.x or XL."""
    try:
        vae, unet = (_read_json(folder, f"{part}/config.json", SHAPE_KEYS[part]) for part in ("vae", "unet"))
        _refuse_other_kinds(folder, unet, vae)
        sample_size, vae_factor = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
        sides = sample_size if isinstance(sample_size, list) else [sample_size]
        if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"the sample_size in unet/config.json is {sample_size!r}")
        return ModelShape(
            vae_factor=vae_factor,
            unet_levels=len(unet["block_out_channels"]),
            latent_channels=unet["in_channels"],
            native_size=max(sides) * vae_factor,
            attention_levels=tuple(i for i, block in enumerate(unet["down_block_types"]) if "Attn" in block),
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion pipeline ({type(error).__name__}: {error})") from None


def _refuse_other_kinds(folder: FolderLike, unet: dict[str, Any], vae: dict[str, Any]) -> None:
    """UserError that names the key by which the UNet is conditioned on something else than text and, for XL, sizes."""
    needed = "not a text-to-image model of Stable Diffusion 1.x, 2.x or XL"
    if unet["in_channels"] != vae["latent_channels"]:
        raise UserError(
            f"{folder}: {needed}: its unet/config.json has in_channels {unet['in_channels']}, and the latents of its "
            f"VAE have {vae['latent_channels']} channels (an inpainting model has more)"
        )
    for key, condition in OTHER_CONDITIONS.items():
        if unet.get(key) and unet[key] != XL_EMBEDDING:
            raise UserError(
                f"{folder}: {needed}: its unet/config.json has {key} {unet[key]!r}: it is also conditioned on "
                f"{condition}"
            )
    if (kind := unet.get("attention_type", "default")) != "default":
        raise UserError(
            f"{folder}: {needed}: its unet/config.json has attention_type {kind!r}: it is also conditioned on boxes, "
            "as GLIGEN is"
        )


def is_xl(folder: FolderLike) -> bool:
    """Whether the UNet is one of Stable Diffusion XL. UserError if its config cannot be read."""
    try:
        return _read_json(folder, "unet/config.json").get("addition_embed_type") == XL_EMBEDDING
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion pipeline ({first_line(error)})") from None


def list_parts(folder: FolderLike) -> tuple[str, ...]:
    """The parts that make the model: five, of XL seven."""
    return PARTS + XL_PARTS if is_xl(folder) else PARTS


def text_parts(folder: FolderLike) -> tuple[str, ...]:
    """The parts that make embeddings of prompts."""
    return tuple(part for part in ("tokenizer", "text_encoder", *XL_PARTS) if part in list_parts(folder))


def reads_zeros_for_empty(folder: FolderLike) -> bool:
    """Whether an empty prompt is all zeros, as model_index.json says of XL; its default there is yes."""
    return is_xl(folder) and bool(_read_json(folder, INDEX_FILE).get("force_zeros_for_empty_prompt", True))


def read_index(folder: FolderLike) -> dict[str, tuple[str, str]]:
    """{part: (its library, its class)} of each part that model_index.json names; UserError if it cannot be read."""
    try:
        index = _read_json(folder, INDEX_FILE)
        lists = {part: value for part, value in index.items() if isinstance(value, list) and not part.startswith("_")}
        named = {part: value for part, value in lists.items() if value != [None, None]}
        for part, value in named.items():
            if len(value) != 2 or not all(isinstance(word, str) for word in value):
                raise ValueError(f"it has {value!r} as {part}, where a library and a class belong")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {INDEX_FILE} cannot be read ({first_line(error)})") from None
    return {part: (value[0], value[1]) for part, value in named.items()}


def _read_json(folder: FolderLike, name: str, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """OSError or ValueError, which name the file, if it is not there or holds no JSON object with `keys` of these
    types."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {type(content).__name__}, where a JSON object belongs")
    for key, wanted in (keys or {}).items():
        if not isinstance(content.get(key), wanted):
            raise ValueError(
                f"{name} has {key} {content.get(key)!r}, where {getattr(wanted, '__name__', wanted)} belongs"
            )
    return content


def has_safety_checker(folder: FolderLike) -> bool:
    """Whether pictures are shown to a safety checker: model_index.json names it and its feature extractor, and both
    are there."""
    return "safety_checker" in kept_extras(folder)


def kept_extras(folder: FolderLike) -> list[str]:
    """The parts beside PARTS that model_index.json names and that a model made of this one has too."""
    there = [part for part in EXTRAS if part in read_index(folder) and _has_extra(folder, part)]
    return there if len(there) == len(EXTRAS) else [part for part in there if part != "safety_checker"]


def left_out_extras(folder: FolderLike) -> list[str]:
    """The parts that model_index.json names and that a model made of this one does not have: they are missing here, or
    serve something else than text-to-image."""
    return sorted(set(read_index(folder)).difference(list_parts(folder), kept_extras(folder)))


def _has_extra(folder: FolderLike, part: str) -> bool:
    return (folder / part / EXTRAS[part]).is_file() and (part != "safety_checker" or bool(list_weights(folder, part)))


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


def list_loaded_weights(folder: FolderLike, part: str, by_transformers: bool) -> list[Path]:
    """The safetensors files that `from_pretrained` reads of a part: one, or those that an index names. OSError if one
    is not there."""
    variant = choose_variant(folder, part)
    suffix, stem = f".{variant}" if variant else "", "model" if by_transformers else "diffusion_pytorch_model"
    single = folder / part / f"{stem}{suffix}.safetensors"
    index = folder / part / f"{stem}.safetensors.index{suffix}.json"
    sharded = index.is_file() and not (by_transformers and single.is_file())
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if sharded else {single.name}
    for name in sorted(names):
        if not (folder / part / name).is_file():
            raise OSError(f"there is no file {name}")
    return [folder / part / name for name in sorted(names)]


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
    headers = map(read_header, _weights_read(folder, "unet"))
    shapes = [tensor.shape for header in headers for name, tensor in header.items() if name.endswith(endings)]
    return sum(rank * (shape[0] + shape[1]) for shape in shapes)


def read_weight_shapes(folder: FolderLike, part: str) -> dict[str, tuple[int, ...]]:
    """{name of each weight of a part: its shape}, from the headers of its safetensors files."""
    headers = map(read_header, _weights_read(folder, part))
    return {name: tensor.shape for header in headers for name, tensor in header.items()}


class StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F16, BF16, F32, ...


def read_header(path: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of a part's safetensors file, whose data are not read. UserError if the file is not whole."""
    with loading_errors(path.parent.parent, path.parent.name):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return {name: StoredTensor(tuple(t.get_shape()), t.get_dtype()) for name, t in tensors.items()}
        except SafetensorError as error:
            raise not_whole(path, error) from None


def not_whole(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(
        f"{path.name} is no whole safetensors file ({first_line(error)}); download it again (a clone without Git LFS "
        "has a note instead)"
    )


def refuse_weights(message: str, names: Iterable[str]) -> None:
    """UserError that begins with `message` and has the first of the weights' names, unless there are none."""
    names = sorted(names)
    if names:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise UserError(f"{message}: {', '.join(names[:NAMES_SHOWN])}{more}")


def fingerprint_model(folder: FolderLike, parts: Sequence[str] | None = None) -> str:
    """A SHA-256 over the configs and weights of parts (None: of all): 64 hex digits.

    Of a weights file the size and one MB at each end count. Reading all of it would cost seconds per GB, and
    fine-tuning changes every tensor. With XL's second text encoder counts what the empty prompt is.
    """
    parts = list_parts(folder) if parts is None else parts
    digest = hashlib.sha256()
    if "text_encoder_2" in parts:
        digest.update(f"zeros for empty {reads_zeros_for_empty(folder)}".encode())
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
    except (UserError, WorkError):
        raise
    except Exception as error:  # what a damaged file or a strange config makes the libraries raise has no common class
        if advice_for(error):  # a full disk or memory is not the model's fault
            raise
        raise UserError(f"{folder}: its {part} cannot be loaded: {first_line(error)}") from None
