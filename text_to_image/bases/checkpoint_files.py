"""What a one-file checkpoint is, by the names and shapes of its weights, and what it predicts."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from bases.families import Family, family_of_file
from bases.ldm_keys import UNET_PREFIX, VAE_PREFIX
from bases.text_encoder_keys import PROJECTION, TextEncoderFormat
from models.folders import refuse_weights
from runtime.errors import UserError, first_line

EMA_PREFIX = "model_ema."
# How ModelSpec and the .yaml name diffusers' prediction types.
MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
LDM_PARAMETERIZATION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SGM_SCALING = {"epsilon": "EpsScaling", "v_prediction": "VScaling"}  # in the .yaml of XL
ARCHITECTURE_PREDICTION = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
# Zero terminal SNR in a .yaml. The original code has no name for it; these are diffusers', kohya's and ComfyUI's.
ZERO_SNR_SETTINGS = ("rescale_betas_zero_snr", "zero_terminal_snr", "ztsnr", "zsnr")
# What the weights of other models begin with, alone or in a whole checkpoint.
OTHER_KINDS = {
    "the refiner of Stable Diffusion XL": r"conditioner\.embedders\.0\.model\.",
    "Playground v2.5": r"edm_(mean|std)$",
    "CosXL": r"edm_vpred\.",
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
    "Flux": r"(model\.diffusion_model\.)?double_blocks\.",
    "a ControlNet": r"control_model\.|controlnet_",
    "a part of a folder in diffusers' format": r"(down_blocks|transformer_blocks|single_transformer_blocks)\.",
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFile:
    """An opened checkpoint: what its header says, and a function that reads one weight."""

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]  # as safetensors names them: F16, BF16, F32
    metadata: Mapping[str, str]
    read: Callable[[str], torch.Tensor]

    @property
    def has_unet(self) -> bool:
        return UNET_PREFIX + "input_blocks.0.0.weight" in self.shapes

    @property
    def has_ema(self) -> bool:
        return _ema_name("input_blocks.0.0.weight") in self.shapes

    @cached_property
    def family(self) -> Family:
        """By the text encoders; 1.x where there is none that is known here."""
        return family_of_file(self.shapes)

    def text_prefix(self, encoder: TextEncoderFormat) -> str | None:
        """What the text encoder's keys begin with; None if it is not in the file."""
        return next((prefix for prefix in encoder.prefixes if prefix + encoder.tokens_key in self.shapes), None)

    def text_shape(self, encoder: TextEncoderFormat, key: str) -> Shape | None:
        """Of the weight that is `key` in transformers, and has a name of its own in the file."""
        return self.shapes.get((self.text_prefix(encoder) or "") + encoder.inner_key(key))

    def projection_name(self, encoder: TextEncoderFormat) -> str:
        """Of the weight that makes the pooled text. Some programs write it as transformers has it, with `.weight`."""
        name = (self.text_prefix(encoder) or encoder.prefixes[0]) + PROJECTION
        return name if name in self.shapes or f"{name}.weight" not in self.shapes else f"{name}.weight"

    def unet_name(self, ldm_key: str) -> str:
        """The name of a UNet weight in the file: the EMA's where there is no other."""
        return UNET_PREFIX + ldm_key if self.has_unet else _ema_name(ldm_key)

    def unet_shape(self, ldm_key: str) -> Shape | None:
        return self.shapes.get(self.unet_name(ldm_key))

    def vae_shape(self, ldm_key: str) -> Shape | None:
        return self.shapes.get(VAE_PREFIX + ldm_key)


def _ema_name(ldm_key: str) -> str:
    """Stable Diffusion's own code names the average of `model.X` without any dots in X."""
    return EMA_PREFIX + f"diffusion_model.{ldm_key}".replace(".", "")


def check_kind(file: CheckpointFile, asked: str) -> None:
    """UserError that says what the file is, unless it is a whole text-to-image Stable Diffusion 1.x, 2.x or XL."""
    keys = file.shapes.keys()
    for kind, pattern in OTHER_KINDS.items():
        if any(re.match(pattern, key) for key in keys):
            raise UserError(f"{asked}: {kind}, which cannot be used here; Stable Diffusion 1.x, 2.x and XL can")
    if any("lora" in key for key in keys):
        raise UserError(
            f"{asked}: a LoRA, not a model; inference.py takes it with --lora, beside the --model it is for"
        )
    if not (file.has_unet or file.has_ema):
        raise UserError(
            f"{asked}: not a one-file checkpoint of Stable Diffusion 1.x, 2.x or XL: it has no {UNET_PREFIX}*, but "
            f"{min(keys, default='no weights')}"
        )
    for encoder in file.family.text_encoders:
        if not file.text_prefix(encoder):
            raise UserError(
                f"{asked}: it has no text encoder that is known here ({encoder.prefixes[-1]}*); a whole model is "
                "needed"
            )
    if not file.vae_shape("encoder.conv_in.weight"):
        raise UserError(f"{asked}: it has no VAE ({VAE_PREFIX}*); a whole model is needed")
    _check_conditions(file, asked)


def _check_conditions(file: CheckpointFile, asked: str) -> None:
    """UserError unless the UNet is conditioned as that of its family."""
    wanted = [file.projection_name(encoder) for encoder in file.family.text_encoders if encoder.has_projection]
    wanted += [file.unet_name("label_emb.0.0.weight")] if file.family.has_size_conditions else []
    refuse_weights(f"{asked}: weights are missing", [name for name in wanted if name not in file.shapes])
    channels = (*(file.unet_shape("input_blocks.0.0.weight") or ()), 0, 0)[1]
    has_label = file.unet_shape("label_emb.0.0.weight") is not None
    reads_pictures = has_label and not file.family.has_size_conditions
    if channels != (file.vae_shape("post_quant_conv.weight") or (0,))[0] or reads_pictures:
        raise UserError(
            f"{asked}: not a text-to-image model of {file.family.name} (inpainting, depth, unCLIP or another kind): "
            f"its UNet reads {channels} channels{' and embeddings of pictures' * reads_pictures}"
        )


# --- prediction type and schedule -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelYaml:
    """The .yaml beside a file, as the original Stable Diffusion code and AUTOMATIC1111 read it."""

    path: Path
    params: Mapping[str, Any]  # `model.params`; empty where there is no such file

    def number(self, name: str, default: float) -> float:
        """UserError if it is there and not a positive number."""
        value = self.params.get(name, default)
        try:
            number = 0.0 if isinstance(value, bool) else float(value)  # YAML takes 85e-5 for a text
        except (TypeError, ValueError):
            number = 0.0
        if not (number > 0 and math.isfinite(number)):
            raise UserError(f"{self.path}: {name} is {value!r}, which is not a positive number; correct it")
        return number

    @property
    def zero_snr(self) -> bool:
        """UserError if it is there and neither true nor false."""
        stated = {name: self.params[name] for name in ZERO_SNR_SETTINGS if name in self.params}
        for name, value in stated.items():
            if not isinstance(value, bool):
                raise UserError(f"{self.path}: {name} is {value!r}; write true or false")
        return any(stated.values())

    @property
    def prediction_type(self) -> str | None:
        """None without a .yaml; eps, as the original code has it, where the .yaml does not say."""
        if "denoiser_config" in self.params:
            return _prediction_type(SGM_SCALING, self._scaling, f"{self.path}: the scaling of its denoiser")
        name = self.params.get("parameterization", "eps")
        return _prediction_type(LDM_PARAMETERIZATION, name, f"{self.path}: parameterization") if self.params else None

    @property
    def _scaling(self) -> str | None:
        """The class by which XL's own code knows what the model predicts; None where it is not there."""
        try:
            return str(self.params["denoiser_config"]["params"]["scaling_config"]["target"]).rpartition(".")[2]
        except (KeyError, TypeError, RecursionError):
            return None


@dataclass(frozen=True)
class Sampling:
    """How a model was trained to be sampled; the weights do not show it."""

    prediction_type: str
    zero_snr: bool
    yaml: ModelYaml


def read_sampling(file: CheckpointFile, asked: str) -> Sampling:
    """By the keys `v_pred` and `ztsnr`, a .yaml beside the file, and its ModelSpec metadata.

    UserError where one is not known or they contradict each other, or where a file of 2.x has none of them: both kinds
    are common there.
    """
    config = _read_yaml(file.path.with_suffix(".yaml"))
    stated = {
        "its key v_pred": "v_prediction" if "v_pred" in file.shapes else None,
        config.path.name: config.prediction_type,
        "its metadata": _modelspec_prediction(file, asked),
    }
    found = {source: prediction for source, prediction in stated.items() if prediction}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{prediction} by {source}" for source, prediction in found.items())
        raise UserError(f"{asked}: what the model predicts is contradictory: {listed}; correct or remove the .yaml")
    if not found and file.family.states_prediction:
        raise UserError(
            f"{asked}: a file of {file.family.name} that does not say whether it predicts noise or velocity; put "
            f"the .yaml that its maker gives with it beside it, as {config.path.name}"
        )
    return Sampling(next(iter(found.values()), "epsilon"), "ztsnr" in file.shapes or config.zero_snr, config)


def _modelspec_prediction(file: CheckpointFile, asked: str) -> str | None:
    if name := file.metadata.get("modelspec.prediction_type"):
        return _prediction_type(MODELSPEC_PREDICTION, name, f"{asked}: modelspec.prediction_type in its metadata")
    architecture = file.metadata.get("modelspec.architecture", "").partition("/")[0]
    return ARCHITECTURE_PREDICTION.get(architecture)


def _prediction_type(names: Mapping[str, str], name: object, where: str) -> str:
    """diffusers' name of it. UserError that begins with `where` if it is not known."""
    for ours, theirs in names.items():
        if name in (ours, theirs):
            return ours
    raise UserError(f"{where} is {name!r}, which is not known here; known: {', '.join(names.values())}")


def _read_yaml(path: Path) -> ModelYaml:
    if not path.is_file():
        return ModelYaml(path, {})
    try:
        return ModelYaml(path, dict(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not the .yaml of a Stable Diffusion model ({first_line(error)}); correct it or move it away"
        ) from None
