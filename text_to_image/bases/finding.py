"""Finds the model that a flag names (a folder, a hub id, one file), and has it checked."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline

from bases.checking import check_model
from bases.one_file import convert_one_file, is_one_file
from bases.pickles import convert_pickles, list_pickles
from models.folders import INDEX_FILE, PARTS, ModelFolder, list_parts, list_variants, list_weights, read_index
from runtime.errors import UserError
from runtime.hub import asking_hub
from runtime.paths import OUTPUTS

# What model_index.json may name as the library of a part; 'stable_diffusion' is diffusers' safety checker.
KNOWN_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")


@dataclass(frozen=True)
class ModelOptions:
    """Which files of a model are used, and where downloads go. What is converted goes to output/converted/."""

    revision: str | None = None  # of the hub's repository
    variant: str | None = None  # of the weights, for the parts that have it
    cache_dir: Path | None = None  # None: the hub's own cache
    allow_pickle: bool = False  # pickled weights are converted, else refused
    tokenizer: Path | None = None  # of a base of one file; None: CLIP's, from the hub


DEFAULT_OPTIONS = ModelOptions()


def find_bases(args: argparse.Namespace) -> tuple[ModelFolder, ModelFolder]:
    """(the base model, the model its UNet is from), which differ only with --non_ema_revision."""
    name, flag = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
    tokenizer = getattr(args, "tokenizer", None)  # runs of earlier versions have no such argument
    tokenizer = Path(tokenizer) if tokenizer else None
    options = ModelOptions(args.revision, args.variant, args.cache_dir, args.allow_pickle, tokenizer)
    base = find_model(name, flag, options)
    if args.non_ema_revision is None:
        return base, base
    return base, find_model(name, flag, replace(options, revision=args.non_ema_revision))


def find_model(name: str, flag: str, options: ModelOptions = DEFAULT_OPTIONS) -> ModelFolder:
    """The model `name`: a folder, a download from the hub, or the folder made of one file. Only safetensors are used.

    Raises UserError that names `flag` or the folder if there is no such model or `check_model` refuses it.
    """
    asked = f"{flag} {name}"
    folder = _find_folder(name, asked, options)
    _check_folder(folder, asked)
    if pickles := _pickles_in_use(folder, _read_part_names(folder, asked)):
        if not options.allow_pickle:
            raise UserError(
                f"{asked}: {pickles[0].parent.name}/{pickles[0].name} is a pickle, which can run code when it is "
                "read; use a model with safetensors, or, if you trust its maker, add --allow_pickle, which converts it"
            )
        folder = convert_pickles(folder, pickles, OUTPUTS / "converted")
    if options.variant:
        _check_variant(folder, name, options.variant)
    model = ModelFolder(folder, options.variant)
    check_model(model)
    return model


def _find_folder(name: str, asked: str, options: ModelOptions) -> Path:
    folder = Path(name).expanduser()
    if is_one_file(folder):
        to = OUTPUTS / "converted"
        return convert_one_file(folder, asked, to, options.tokenizer, options.allow_pickle, options.cache_dir)
    found = folder if folder.is_dir() else _download(name, asked, options)
    if options.tokenizer:
        raise UserError(f"--tokenizer {options.tokenizer}: it is for a model of one file; {asked} has its own")
    return found


def _download(name: str, asked: str, options: ModelOptions) -> Path:
    with asking_hub(f"{asked}: no such folder or file, and not available from the Hugging Face hub"):
        path = DiffusionPipeline.download(
            name,
            use_safetensors=None if options.allow_pickle else True,  # None: pickles where there is nothing else
            revision=options.revision,
            variant=options.variant,
            cache_dir=options.cache_dir,
        )
    return Path(path)


def _check_folder(folder: Path, asked: str) -> None:
    if not (folder / INDEX_FILE).is_file():
        raise UserError(f"{asked}: the folder has no {INDEX_FILE}, so it is not a diffusers pipeline")
    if not (folder / "text_encoder").is_dir() and (folder / "text_encoder_2").is_dir():
        raise UserError(f"{asked}: XL's refiner, which goes over pictures that its base generates; name that base")
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        raise UserError(f"{asked}: the folder has no {', '.join(missing)}/; a Stable Diffusion pipeline is needed")
    if missing := [part for part in list_parts(folder) if not (folder / part).is_dir()]:
        raise UserError(f"{asked}: the folder has no {', '.join(missing)}/, which Stable Diffusion XL has")


def _read_part_names(folder: Path, asked: str) -> list[str]:
    """The parts that model_index.json names and the folder has. UserError if one is code that comes with the model."""
    libraries = {part: library for part, (library, _) in read_index(folder).items()}
    for part, library in libraries.items():
        if library not in KNOWN_LIBRARIES:
            raise UserError(f"{asked}: its {part} is custom code ({library!r}), which is never run here")
    return [part for part in sorted(libraries) if (folder / part).is_dir()]


def _pickles_in_use(folder: Path, parts: Sequence[str]) -> list[Path]:
    """The pickles of the parts that have no safetensors."""
    return [path for part in parts if not list_weights(folder, part) for path in list_pickles(folder, part)]


def _check_variant(folder: Path, name: str, variant: str) -> None:
    available = list_variants(folder, "unet")
    if variant not in available:
        names = ", ".join(sorted(found or "plain weights" for found in available))
        raise UserError(f"--variant {variant}: the UNet of {name} has no such weights; it has {names}")
