"""The weights that generate: a pipeline, a run's checkpoint on its base, LoRAs on either; found, described, loaded."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from bases.finding import ModelOptions, find_bases, find_model
from bases.lora_files import check_lora_fits, files_of_lora, fuse_lora, read_lora_file
from bases.one_file import is_one_file
from generation.loras import (
    ScaledLora,
    choose_scales,
    find_lora,
    recorded_facts,
    run_of_lora,
    schedule_note,
    trained_schedule,
)
from models.defaults import REAL_MODEL
from models.folders import FolderLike, ModelFolder, fingerprint_file, fingerprint_model, list_parts
from models.loading import TextModel, load_prompt_encoder, load_text_encoder, load_unet
from models.lora import LORA_FILE
from models.sampling import load_sampler
from models.text_encoding import PromptEncoder
from runs.checkpoints import complete_checkpoints, find_missing_file
from runs.records import RUN_FILE, read_run
from runtime.errors import UserError
from runtime.paths import REPOSITORY, display_path


@dataclass(frozen=True)
class GenerationWeights:
    """A whole pipeline in `base`; its UNet may come from another folder, and LoRAs may change it."""

    name: str  # as the user gave it
    base: ModelFolder
    unet_folder: FolderLike  # the base itself, another revision of it, or a checkpoint
    unet_part: str  # 'unet', or 'unet_ema' of a checkpoint
    loras: tuple[ScaledLora, ...]
    run: dict[str, Any]  # run.json of the training run; empty where it was not trained here
    triggers: tuple[str, ...]  # the phrases that the model and the LoRAs were trained with
    schedule_note: str | None  # a line where a LoRA was trained on another noise schedule

    @property
    def unet(self) -> Path:
        """The UNet's own folder."""
        return Path(self.unet_folder) / self.unet_part

    @property
    def has_own_unet(self) -> bool:
        return Path(self.unet_folder) != self.base.path

    @property
    def scheduler_overrides(self) -> dict[str, Any]:
        """The run's arguments, where they must override the base's scheduler config: a base does not know what was
        trained on it, while a finished pipeline has a config of its own."""
        return self.run.get("arguments", {}) if self.has_own_unet or self.loras else {}

    @cached_property
    def recorded_name(self) -> str:
        """The model's name in images.jsonl. A folder or file in this repository is named relative to it, so that the
        name does not depend on where the repository lies."""
        path = Path(self.name).expanduser().resolve()
        in_repository = path.exists() and path.is_relative_to(REPOSITORY)
        name = path.relative_to(REPOSITORY).as_posix() if in_repository else self.name
        if self.has_own_unet:
            name += f"/{self.unet.parent.name}/{self.unet.name}"
        return name + "".join(f" + {lora.file.parent.name}/{lora.file.name} at {lora.scale:g}" for lora in self.loras)

    def describe(self) -> str:
        """One line: the folders and files that the weights come from."""
        parts = []
        if self.has_own_unet:
            parts.append(f"the UNet of {display_path(self.unet)}")
        for file, scale in self.loras:
            parts.append(f"the LoRA {display_path(file)}{'' if scale == 1 else f' at {scale:g}'}")
        return " with ".join([display_path(self.base), *([" and ".join(parts)] if parts else [])])

    def fingerprint(self) -> str:
        """A hash of all weights and configs."""
        other_parts = [part for part in list_parts(self.base) if part != "unet"]
        facts = [fingerprint_model(self.base, other_parts), fingerprint_model(self.unet_folder, [self.unet_part])]
        for lora, scale in self.loras:
            facts.append(" ".join([*map(fingerprint_file, files_of_lora(lora)), str(scale)]))
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()


def find_weights(
    model: str,
    checkpoint: str | None = None,
    loras: Sequence[str] = (),
    lora_scales: Sequence[float] = (),
    tokenizer: Path | None = None,
    allow_pickle: bool = False,
) -> GenerationWeights:
    """What the flags of these names ask for; loads no weight.

    `model` is a diffusers folder, a run's folder, a hub id or one file, for which `tokenizer` is; its pickles are
    refused unless `allow_pickle`. `checkpoint` names one of that run's, or 'latest', and means its EMA weights unless
    it ends in '/unet'; each of `loras` is a folder, a file or a hub id. `lora_scales` are their strengths in the same
    order; where the run is a LoRA itself, its own may stand before them. Raises UserError where one of them is missing
    or not usable.
    """
    folder = Path(model).expanduser()
    model_run = read_run(folder) or {}
    options = ModelOptions(tokenizer=tokenizer, allow_pickle=allow_pickle)
    unet, own_loras = _trained_parts(folder, model_run, checkpoint)
    if (unet or own_loras) and not _is_pipeline(folder):
        base, unet_base = _find_bases_of_run(model, model_run, options, own_loras)
    else:
        base = unet_base = _find_pipeline(model, folder, model_run, options)
    scales = choose_scales(lora_scales, len(own_loras), len(loras))
    files = own_loras + [find_lora(lora) for lora in loras]
    unet_folder, unet_part = (unet.parent, unet.name) if unet else (unet_base, "unet")
    for file in files:
        check_lora_fits(file, unet_folder, unet_part, base)
    facts = {file: recorded_facts(file) for file in files}
    return GenerationWeights(
        name=model,
        base=base,
        unet_folder=unet_folder,
        unet_part=unet_part,
        loras=tuple(ScaledLora(file, scale) for file, scale in zip(files, scales, strict=True)),
        run=model_run or next(filter(None, map(run_of_lora, files)), {}),
        triggers=tuple(dict.fromkeys(t for run in (model_run, *facts.values()) if (t := run.get("trigger")))),
        schedule_note=schedule_note(facts, trained_schedule(model_run, base), base),
    )


def _trained_parts(folder: Path, run: dict[str, Any], checkpoint: str | None) -> tuple[Path | None, list[Path]]:
    """What a run trained, where it is not a pipeline: (the UNet's folder, LoRA files), at most one of either."""
    if checkpoint is not None:
        checkpoint_folder, part = _find_checkpoint(folder, run, checkpoint)
        lora = checkpoint_folder / LORA_FILE
        return (None, [lora]) if lora.is_file() else (checkpoint_folder / part, [])
    lora = folder / LORA_FILE
    return None, [lora] if lora.is_file() and not _is_pipeline(folder) else []


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _find_pipeline(model: str, folder: Path, run: dict[str, Any], options: ModelOptions) -> ModelFolder:
    if run and not _is_pipeline(folder) and complete_checkpoints(folder):
        raise UserError(f"--model {model}: the run is not finished; --checkpoint latest uses what it has so far")
    # The result of a base of one file has a tokenizer of its own, and job.sh gives inference the flags of training.
    return find_model(model, "--model", replace(options, tokenizer=None) if run else options)


def _find_bases_of_run(
    model: str, run: dict[str, Any], options: ModelOptions, loras: Sequence[Path]
) -> tuple[ModelFolder, ModelFolder]:
    """(the base that the run trained, the pipeline whose UNet it started from); `options` win over the run's.

    `loras` is what the run trained, if that is a LoRA: UserError says how to name another base for it.
    """
    if not run:
        raise UserError(
            f"--model {model}: a LoRA without {RUN_FILE}, so its base is not known; name both: "
            f"--model {REAL_MODEL} --lora {model}"
        )
    arguments = {**run["arguments"], "pretrained_model_name_or_path": run["base_model"]}
    asked = {"tokenizer": options.tokenizer, "allow_pickle": options.allow_pickle}
    arguments |= {name: value for name, value in asked.items() if value}
    other = f"; if it has moved, name it where it is now: --model BASE --lora {loras[0].parent}" if loras else ""
    base = Path(run["base_model"])
    if base.is_absolute() and not base.exists() and not is_one_file(base):  # of a file a converted copy may be left
        raise UserError(f"--model {model}: its base {base} is gone; put it back (a link will do){other}")
    try:
        return find_bases(argparse.Namespace(**arguments))
    except UserError as error:
        raise UserError(f"--model {model}: what it was trained on: {error}{other}") from None


def _find_checkpoint(folder: Path, run: dict[str, Any], asked: str) -> tuple[Path, str]:
    """(its folder, 'unet' or 'unet_ema'): the EMA weights if it has some and 'unet' is not asked for."""
    if not run:
        raise UserError(f"--checkpoint {asked}: --model {folder} is not a training run: it has no {RUN_FILE}")
    complete = complete_checkpoints(folder)
    name, _, part = asked.strip("/").partition("/")
    path = complete[-1] if name == "latest" and complete else folder / name
    if path not in complete:
        reason = find_missing_file(path) if path.is_dir() and name else "there is no such checkpoint"
        names = ", ".join(checkpoint.name for checkpoint in complete) or "none"
        raise UserError(f"--checkpoint {asked}: {reason}; complete in {folder}: {names}")
    part = part or ("unet_ema" if (path / "unet_ema").is_dir() else "unet")
    if not (path / part).is_dir() and not (path / LORA_FILE).is_file():
        parts = ", ".join(sorted(unet.name for unet in path.glob("unet*")))
        raise UserError(f"--checkpoint {asked}: no {part} in it; there is {parts}")
    return path, part


def load_generation_unet(weights: GenerationWeights, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with the LoRAs fused into its weights, in fp32 before it becomes `dtype`."""
    unet = load_unet(weights.unet_folder, subfolder=weights.unet_part)
    for file, scale in weights.loras:
        fuse_lora(read_lora_file(file), unet, "unet", scale)
    return unet.to(dtype, memory_format=torch.channels_last).eval()


def load_generation_text_encoder(weights: GenerationWeights, part: str = "text_encoder") -> TextModel:
    """A text encoder in fp32, with the LoRAs fused that have a part for it."""
    text_encoder = load_text_encoder(weights.base, part)
    for file, scale in weights.loras if part == "text_encoder" else ():  # XL's second one is left as it is
        fuse_lora(read_lora_file(file), text_encoder, part, scale)
    return text_encoder


def load_generation_prompt_encoder(
    weights: GenerationWeights, max_chunks: int, device: torch.device, dtype: torch.dtype
) -> PromptEncoder:
    return load_prompt_encoder(
        weights.base, max_chunks, device, dtype, lambda _, part: load_generation_text_encoder(weights, part)
    )


def load_generation_sampler(weights: GenerationWeights, name: str) -> SchedulerMixin:
    """The sampler SAMPLERS[`name`] on the noise schedule that the weights were trained with."""
    overrides = weights.scheduler_overrides
    zero_snr = overrides.get("rescale_betas_zero_snr", False)
    return load_sampler(weights.base, overrides.get("prediction_type"), zero_snr, name)


def trigger_warning(weights: GenerationWeights, prompts: Sequence[str]) -> str | None:
    """A line for each trigger phrase of the training that prompts lack; None if all have them."""
    lines = []
    for trigger in weights.triggers:
        if without := sum(trigger.lower() not in prompt.lower() for prompt in prompts):
            count = f"{without} of {len(prompts)}"
            lines.append(f"{count} prompts lack the trigger phrase that the model was trained with: {trigger}")
    return "\n".join(lines) or None
