"""Stable Diffusion 1.x/2.x folders in diffusers' format: find, describe, load and save them."""

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

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from errors import UserError, first_line, what_helps
from model_defaults import GENERATION_DEFAULTS, TRAINING_DEFAULTS

CARRIED_FORWARD = ("LICENSE*", "LICENCE*", TRAINING_DEFAULTS, GENERATION_DEFAULTS)
PLAIN_ATTENTION_MAX_TOKENS = 2048
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
KNOWN_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # the third: diffusers' safety checker


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and remarks out of the scripts' output; their errors and downloads still show."""
    unwanted = are_progress_bars_disabled()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not unwanted:
        enable_progress_bars()  # transformers has disabled the hub's with its own; some wait minutes for gigabytes


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
    _check_components(folder, f"{flag} {name}")
    if pickles := [path for part in _parts(folder) if not _weights(folder, part) for path in _pickles(folder, part)]:
        if pickles_to is None:
            raise UserError(
                f"{flag} {name}: {shown_part(pickles[0])} is a pickle, which can run code when it is read; take a "
                "model with safetensors, or, where you trust its maker, let training convert it with --allow_pickle"
            )
        return convert_pickles(folder, pickles, pickles_to)
    return folder


def _check_components(folder: Path, what: str) -> None:
    """UserError where the pipeline is made of code that comes with it: such code is never run."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        libraries = {part: value[0] for part, value in index.items() if isinstance(value, list)}
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{what}: model_index.json cannot be read ({first_line(error)})") from None
    for part, library in libraries.items():
        if library not in KNOWN_LIBRARIES:
            raise UserError(f"{what}: its {part} is code of its own ({library!r}), which is never run here")


def _parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _pickles(folder: Path, part: str) -> list[Path]:
    return sorted(path for path in (folder / part).iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))


def shown_part(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def convert_pickles(folder: Path, pickles: Sequence[Path], to: Path) -> Path:
    """A copy of the model with safetensors in place of `pickles`; once, under a name that follows from their bytes.

    They are read as weights alone, so that what else is in them is an error and not run.
    """
    content = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in pickles)).hexdigest()
    whole = to / f"{folder.name}-{content[:8]}"
    if whole.is_dir():
        return whole
    to.mkdir(parents=True, exist_ok=True)
    part, names = Path(tempfile.mkdtemp(dir=to, prefix=".")), {path.name for path in pickles}
    shutil.copytree(folder, part, dirs_exist_ok=True, ignore=lambda _, found: [n for n in found if n in names])
    for path in pickles:
        stem = path.stem if path.stem.startswith("diffusion_") else path.stem.replace("pytorch_model", "model")
        with loading(folder, path.parent.name):
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
            f"{flag} {name}: no such folder, and not to be had from the Hugging Face hub: {first_line(error)}"
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


VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")


def variant_of(folder: Path, part: str) -> str | None:
    """'fp16' where a part's weights are there as `*.fp16.safetensors` alone, None where they have their plain name."""
    variants = {match[1] if (match := VARIANT.search(path.name)) else None for path in _weights(folder, part)}
    return None if None in variants else min(variants, default=None)


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
    with loading(path.parent.parent, path.parent.name), open(path, "rb") as file:
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


def load_unet(folder: Path, dtype=torch.float32, subfolder: str = "unet") -> UNet2DConditionModel:
    """With weights in channels_last, in which convolutions are fastest on CPUs and, in half precision, on GPUs.

    Always, so that the optimizer's state of a checkpoint has the layout of the weights it goes on with.
    """
    with loading(folder, subfolder):
        unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder=subfolder, use_safetensors=True, variant=variant_of(folder, subfolder)
        )
        # .to(): the libraries' versions name the dtype argument differently and differ in what they do without it.
        return unet.to(dtype, memory_format=torch.channels_last)


def load_vae(folder: Path, dtype=torch.float32) -> AutoencoderKL:
    with loading(folder, "vae"):
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", use_safetensors=True, variant=variant_of(folder, "vae")
        )
    return vae.to(dtype).eval()


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer, its model_max_length what the text encoder really reads (77 for CLIP)."""
    with loading(folder, "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        positions = json.loads((folder / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_text_encoder(folder: Path, dtype=torch.float32) -> CLIPTextModel:
    with loading(folder, "text_encoder"):
        text_encoder = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", use_safetensors=True, variant=variant_of(folder, "text_encoder")
        )
    return text_encoder.to(dtype).eval()


def load_noise_scheduler(folder: Path, prediction_type: str | None = None, zero_snr: bool = False) -> DDPMScheduler:
    """The forward process of the model's own schedule; `prediction_type` overrides what its config says.

    `zero_snr` rescales it to end in pure noise (arXiv:2305.08891).
    """
    changes = {"rescale_betas_zero_snr": True} if zero_snr else {}
    changes |= {"prediction_type": prediction_type} if prediction_type else {}
    with loading(folder, "scheduler"):
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **changes)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{folder}: prediction type {scheduler.config.prediction_type!r} cannot be trained here")
    return scheduler


@contextmanager
def loading(folder: Path, part: str) -> Iterator[None]:
    """Whatever a library raises while it loads `part` becomes a UserError that names it, in one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        if what_helps(error):  # a full disk or memory is no fault of the model
            raise
        raise UserError(f"{folder}: its {part} cannot be loaded: {first_line(error)}") from None


def choose_attention(unet: UNet2DConditionModel, shape: ModelShape, height: int, width: int, device: str) -> None:
    """Plain attention on the CPU, where the fused kind's backward is slow at small sizes (a step takes 1.3 times as
    long); fused on GPUs and for larger pictures, whose score matrices would fill the memory."""
    _, h, w = shape.latent_shape(height, width)
    tokens = max((h >> level) * (w >> level) for level in shape.attention_levels or (0,))
    if device == "cpu" and tokens <= PLAIN_ATTENTION_MAX_TOKENS:
        unet.set_attn_processor(AttnProcessor())


def save_pipeline(unet: UNet2DConditionModel, base: Path, output: Path, noise_scheduler: DDPMScheduler) -> None:
    """Writes the whole pipeline, `base` with another UNet, in fp32 throughout: plain diffusers cannot run mixed ones.

    What else `base` has stays as it is (SD 1.x's safety checker, the scheduler's class), licence and defaults too.
    """
    with loading(base, "pipeline"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            base, unet=unet, vae=load_vae(base), text_encoder=load_text_encoder(base), use_safetensors=True,
            variant=variant_of(base, "unet"),
        ).to(torch.float32)  # fmt: skip
    pipeline.scheduler = sampling_scheduler(pipeline.scheduler, noise_scheduler)
    pipeline.save_pretrained(output, safe_serialization=True)
    save_vocabulary(pipeline.tokenizer, output / "tokenizer")
    carry_forward(base, output)


def carry_forward(base: Path, output: Path) -> None:
    """The base's licence and defaults, for what was made from it."""
    for pattern in CARRIED_FORWARD:
        for path in base.glob(pattern):
            shutil.copyfile(path, output / path.name)


def sampling_scheduler(own, noise_scheduler: DDPMScheduler):
    """The model's own scheduler, told what was trained; a schedule that ends in pure noise is sampled from its end."""
    own.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    if not noise_scheduler.config.rescale_betas_zero_snr:
        return own
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    if "rescale_betas_zero_snr" in own.config:
        return own.from_config(own.config, **changed)
    return DDIMScheduler.from_config(own.config, **changed)  # PNDM, SD 1.x's own, knows no such schedule


def save_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json: transformers 5 writes only the latter."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
