"""Which weights draw: a pipeline, a run's checkpoint on its base, LoRAs on either; found, described, loaded."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download
from transformers import CLIPTextModel

from models.defaults import REAL_MODEL
from models.finding import find_bases, find_model
from models.folders import PARTS, FolderLike, ModelFolder, fingerprint_file, fingerprint_model, loading_errors
from models.loading import load_text_encoder, load_unet
from models.lora import LORA_FILE
from models.sampling import load_sampler
from runs.checkpoints import complete_checkpoints, find_missing_file
from runs.records import RUN_FILE, read_run
from runtime.errors import UserError, hub_error_reason
from runtime.paths import display_path


@dataclass(frozen=True)
class GenerationWeights:
    """What draws. `base` is a whole pipeline; its UNet may be another's, and LoRAs may change it."""

    name: str  # as it was asked for
    base: ModelFolder
    unet: FolderLike  # the folder that holds `subfolder`
    subfolder: str
    loras: tuple[tuple[Path, float], ...]  # files, and how strongly each counts
    run: dict  # run.json of what was trained here, else empty

    @property
    def scheduler_overrides(self) -> dict:
        """The arguments of the run, where they say how it is sampled: a pipeline does so itself, and a base does not
        know what was trained on it."""
        is_pipeline = self.unet == self.base and not self.loras
        return {} if is_pipeline else self.run.get("arguments", {})

    def told(self) -> str:
        """In one line what it is made of."""
        parts = [display_path(self.base)]
        if self.unet != self.base:
            parts.append(f"the UNet of {display_path(self.unet / self.subfolder)}")
        parts += [
            f"the LoRA {display_path(path)}{'' if scale == 1 else f' at {scale:g}'}" for path, scale in self.loras
        ]
        return " with ".join(parts)

    def fingerprint(self) -> str:
        """A hash of all weights and configs."""
        others = [part for part in PARTS if part != "unet"]
        facts = [fingerprint_model(self.base, others), fingerprint_model(self.unet, [self.subfolder])]
        facts += [f"{fingerprint_file(path)} {scale}" for path, scale in self.loras]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()


def find_weights(
    model: str, checkpoint: str | None = None, lora: str | None = None, lora_scale: float = 1.0
) -> GenerationWeights:
    """`model` is a folder, a run of this repository or a hub id; `checkpoint` one of the run's ('latest' the newest,
    'checkpoint-100/unet' the weights and not their average); `lora` a folder, a file or a hub id.

    UserError where one of them is not there or not usable.
    """
    folder = Path(model).expanduser()
    run = read_run(folder) or {}
    loras: list[Path] = []
    unet, subfolder = None, "unet"
    if checkpoint is not None:
        place, subfolder = _checkpoint(folder, run, checkpoint)
        if (place / LORA_FILE).is_file():
            loras.append(place / LORA_FILE)
        else:
            unet = place
    elif (folder / LORA_FILE).is_file() and not _is_pipeline(folder):
        loras.append(folder / LORA_FILE)
    if (loras or unet) and not _is_pipeline(folder):
        base, own_unet = _bases_of_run(model, run)
    else:
        base = own_unet = _pipeline(model, folder, run)
    if lora is not None:
        loras.append(_lora_file(lora))
        run = run or read_run(loras[-1].parent) or read_run(loras[-1].parent.parent) or {}
    if lora_scale != 1 and not loras:
        raise UserError(f"--lora_scale {lora_scale:g}: there is no LoRA; name one with --lora FOLDER")
    scales = [1.0] * (len(loras) - 1) + [lora_scale]  # it is meant for the last one
    subfolder = subfolder if unet else "unet"
    return GenerationWeights(model, base, unet or own_unet, subfolder, tuple(zip(loras, scales, strict=False)), run)


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _pipeline(model: str, folder: Path, run: dict) -> ModelFolder:
    if run and not _is_pipeline(folder) and complete_checkpoints(folder):
        raise UserError(f"--model {model}: the run is not finished; --checkpoint latest draws with what it has so far")
    return find_model(model, "--model")


def _bases_of_run(model: str, run: dict) -> tuple[ModelFolder, ModelFolder]:
    """What a run trained on, and where its UNet is from, where its own folder holds a LoRA or checkpoints alone."""
    if not run:
        raise UserError(
            f"--model {model}: a LoRA without {RUN_FILE}, so its base is not known; name both: "
            f"--model {REAL_MODEL} --lora {model}"
        )
    asked = {**run["arguments"], "pretrained_model_name_or_path": run["base_model"]}
    try:
        return find_bases(argparse.Namespace(**asked))
    except UserError as error:
        raise UserError(f"--model {model}: what it was trained on: {error}") from None


def _checkpoint(folder: Path, run: dict, asked: str) -> tuple[Path, str]:
    """(its folder, 'unet' or 'unet_ema'): the averaged weights where there are some and 'unet' is not asked for."""
    if not run:
        raise UserError(f"--checkpoint {asked}: --model {folder} is no run: it has no {RUN_FILE}")
    there = complete_checkpoints(folder)
    name, _, part = asked.strip("/").partition("/")
    place = there[-1] if name == "latest" and there else folder / name
    if place not in there:
        reason = find_missing_file(place) if place.is_dir() and name else "there is no such checkpoint"
        names = ", ".join(path.name for path in there) or "none"
        raise UserError(f"--checkpoint {asked}: {reason}; complete in {folder}: {names}")
    part = part or ("unet_ema" if (place / "unet_ema").is_dir() else "unet")
    if not (place / part).is_dir() and not (place / LORA_FILE).is_file():
        parts = ", ".join(sorted(path.name for path in place.glob("unet*")))
        raise UserError(f"--checkpoint {asked}: no {part} in it; there is {parts}")
    return place, part


def _lora_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        files = [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"--lora {name}: {len(files)} safetensors files in it; name the file")
        return files[0]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--lora {name}: not a safetensors file; other formats can run code when they are read")
        return path
    try:
        return Path(hf_hub_download(name, LORA_FILE))
    except Exception as error:  # the hub's errors have no common class
        raise UserError(
            f"--lora {name}: no such file or folder, and not to be had from the hub: {hub_error_reason(error)}"
        ) from None


def load_generation_unet(source: GenerationWeights, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with the LoRAs melted into its weights, in fp32 before it becomes `dtype`."""
    unet = load_unet(source.unet, subfolder=source.subfolder)
    for path, scale in source.loras:
        with loading_errors(path.parent, path.name):
            state, alphas, metadata = _lora_state(path, unet)
            StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
            unet.fuse_lora(lora_scale=scale)
            unet.unload_lora()
    return unet.to(dtype, memory_format=torch.channels_last).eval()


def load_generation_text_encoder(source: GenerationWeights, dtype: torch.dtype) -> CLIPTextModel:
    """The text encoder, changed by those LoRAs that have a part for it."""
    text_encoder = load_text_encoder(source.base)
    for path, scale in source.loras:
        with loading_errors(path.parent, path.name):
            state, alphas, metadata = _lora_state(path, None)
            if any(name.startswith("text_encoder.") for name in state):
                StableDiffusionPipeline.load_lora_into_text_encoder(
                    state, alphas, text_encoder, "text_encoder", lora_scale=scale, metadata=metadata
                )
    return text_encoder.to(dtype).eval()


def _lora_state(path: Path, unet: UNet2DConditionModel | None) -> tuple[dict, dict | None, dict | None]:
    """(weights in diffusers' names, alphas, metadata) of a file in diffusers' or kohya's format.

    UserError where it is for another kind of model, of which diffusers would say nothing and load nothing.
    """
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        path.parent, weight_name=path.name, use_safetensors=True, return_lora_metadata=True,
        unet_config=unet.config if unet else None,
    )  # fmt: skip
    if not any(name.startswith(("unet.", "text_encoder.")) for name in state):
        raise UserError(f"{path}: no LoRA for Stable Diffusion 1.x or 2.x: it has {min(state, default='nothing')}")
    return state, alphas, metadata


def sampler_of(source: GenerationWeights, name: str):
    """The sampler SAMPLERS[`name`] on the schedule that was trained."""
    told = source.scheduler_overrides
    return load_sampler(source.base, told.get("prediction_type"), told.get("rescale_betas_zero_snr", False), name)


def missing_trigger(source: GenerationWeights, prompts: Sequence[str]) -> str | None:
    """A line about the phrase that the run was trained to answer to, where prompts lack it."""
    trigger = source.run.get("trigger")
    lacking = [prompt for prompt in prompts if trigger and trigger.lower() not in prompt.lower()]
    if not lacking:
        return None
    return (
        f"{len(lacking)} of {len(prompts)} prompts lack the trigger phrase that the model was trained with: {trigger}"
    )
