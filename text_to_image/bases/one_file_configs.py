"""What a one-file checkpoint is, from the names and shapes of its weights, and the configs that diffusers needs."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bases.ldm_keys import CLIP_PREFIX, OPEN_CLIP_PREFIX, OPEN_CLIP_VIT_H_LAYERS, UNET_PREFIX, VAE_PREFIX
from runtime.errors import UserError, first_line

EMA_PREFIX = "model_ema."
BARE_CLIP_PREFIX = CLIP_PREFIX.removesuffix("text_model.")  # as some programs write it
# How ModelSpec and the .yaml name diffusers' prediction types.
MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
LDM_PARAMETERIZATION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
ARCHITECTURE_PREDICTION = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
# Zero terminal SNR in a .yaml. The original code has no name for it; these are diffusers', kohya's and ComfyUI's.
ZERO_SNR_SETTINGS = ("rescale_betas_zero_snr", "zero_terminal_snr", "ztsnr", "zsnr")
# What the weights of other models begin with, alone or in a whole checkpoint.
OTHER_KINDS = {
    "Stable Diffusion XL": r"conditioner\.",
    "Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\.",
    "Flux": r"(model\.diffusion_model\.)?double_blocks\.",
    "a ControlNet": r"control_model\.|controlnet_",
    "a part of a folder in diffusers' format": r"(down_blocks|transformer_blocks|single_transformer_blocks)\.",
}
# Of all Stable Diffusion 1.x and 2.x, and not to be seen in the weights.
NORM_GROUPS, UNET_HEADS, HEAD_SIZE, VAE_SCALE = 32, 8, 64, 0.18215
SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}

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

    @property
    def clip_prefix(self) -> str | None:
        """What the text encoder's keys begin with; None if it has none."""
        first = {CLIP_PREFIX: "embeddings.", BARE_CLIP_PREFIX: "embeddings.", OPEN_CLIP_PREFIX: ""}
        tokens = "token_embedding.weight"
        return next((prefix for prefix, inner in first.items() if prefix + inner + tokens in self.shapes), None)

    @property
    def version(self) -> int:
        """Stable Diffusion 1 or 2, by the text encoder."""
        return 2 if self.clip_prefix == OPEN_CLIP_PREFIX else 1

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
    """UserError that says what the file is, unless it is a whole text-to-image Stable Diffusion 1.x or 2.x."""
    keys = file.shapes.keys()
    for kind, pattern in OTHER_KINDS.items():
        if any(re.match(pattern, key) for key in keys):
            raise UserError(f"{asked}: {kind}, which cannot be used here; Stable Diffusion 1.x and 2.x can")
    if any("lora" in key for key in keys):
        raise UserError(
            f"{asked}: a LoRA, not a model; inference.py takes it with --lora, beside the --model it is for"
        )
    if not (file.has_unet or file.has_ema):
        raise UserError(
            f"{asked}: not a one-file checkpoint of Stable Diffusion 1.x or 2.x: it has no {UNET_PREFIX}*, but "
            f"{min(keys, default='no weights')}"
        )
    if not file.clip_prefix:
        raise UserError(
            f"{asked}: it has no text encoder that is known here (cond_stage_model.*); a whole model is needed"
        )
    if not file.vae_shape("encoder.conv_in.weight"):
        raise UserError(f"{asked}: it has no VAE ({VAE_PREFIX}*); a whole model is needed")
    channels = (*(file.unet_shape("input_blocks.0.0.weight") or ()), 0, 0)[1]
    if channels != (file.vae_shape("post_quant_conv.weight") or (0,))[0] or file.unet_shape("label_emb.0.0.weight"):
        raise UserError(
            f"{asked}: not a text-to-image model of Stable Diffusion 1.x or 2.x (inpainting, depth, unCLIP or another "
            "kind)"
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
        name = self.params.get("parameterization", "eps")
        return _prediction_type(LDM_PARAMETERIZATION, name, f"{self.path}: parameterization") if self.params else None


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
    if not found and file.version == 2:
        raise UserError(
            f"{asked}: a file of Stable Diffusion 2.x that does not say whether it predicts noise or velocity; put "
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


# --- configs --------------------------------------------------------------------------------------------------------


def make_configs(file: CheckpointFile, sampling: Sampling, asked: str) -> dict[str, dict[str, Any]]:
    """{part: its config in diffusers' format}. UserError where the layers are not built as Stable Diffusion's are."""
    unet_levels, vae_levels = _unet_levels(file), _vae_levels(file)
    text = _text_encoder_config(file)
    _check_layers(file.version, unet_levels, vae_levels, text, asked)
    # The .yaml that came with the 2.x models for 768 px says 64, which is what most say without meaning it.
    stated = int(sampling.yaml.number("image_size", 64))
    latent_size = 96 if stated == 64 and _is_768_v(file, sampling) else stated
    unet = _unet_config(file, unet_levels, latent_size)
    vae = _vae_config(file, vae_levels, latent_size, sampling.yaml.number("scale_factor", VAE_SCALE))
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise UserError(
            f"{asked}: its UNet reads text embeddings of {unet['cross_attention_dim']} numbers, its text encoder "
            f"makes {text['hidden_size']}: they do not belong together"
        )
    return {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": _scheduler_config(sampling)}


def _check_layers(
    version: int,
    unet_levels: list[tuple[int, int, bool]],
    vae_levels: list[tuple[int, int]],
    text: Mapping[str, Any],
    asked: str,
) -> None:
    """The weights do not show how many heads and groups share a layer; in Stable Diffusion's own sizes it is known."""
    widths = [channels for channels, *_ in (*unet_levels, *vae_levels)]
    heads = [channels for channels, *_ in unet_levels if version == 2] + [text["hidden_size"]]
    layers = [{count for _, count, *_ in levels} for levels in (unet_levels, vae_levels)]
    fits = all(w and w % NORM_GROUPS == 0 for w in widths) and all(w and w % HEAD_SIZE == 0 for w in heads)
    if not fits or any(len(counts) != 1 for counts in layers):
        sizes = f"{', '.join(map(str, widths))} channels, text embeddings of {text['hidden_size']} numbers"
        raise UserError(
            f"{asked}: its layers are not built as Stable Diffusion's are ({sizes}), so the file does not say how "
            "they work; a folder in diffusers' format is needed"
        )


def _is_768_v(file: CheckpointFile, sampling: Sampling) -> bool:
    return file.version == 2 and sampling.prediction_type == "v_prediction"


def _unet_levels(file: CheckpointFile) -> list[tuple[int, int, bool]]:
    """(channels, layers, whether they have attention) of each level, from the list `input_blocks`."""
    levels, n = [(0, 0, False)], 1
    while True:
        block = f"input_blocks.{n}.0"
        if shape := file.unet_shape(f"{block}.in_layers.2.weight") or file.unet_shape(f"{block}.in_layers.2.bias"):
            has_attention = file.unet_shape(f"input_blocks.{n}.1.proj_in.weight") is not None
            levels[-1] = (shape[0], levels[-1][1] + 1, has_attention)
        elif file.unet_shape(f"{block}.op.weight") or file.unet_shape(f"{block}.op.bias"):
            levels.append((0, 0, False))
        else:
            return levels
        n += 1


def _vae_levels(file: CheckpointFile) -> list[tuple[int, int]]:
    """(channels, layers) of each level of the encoder."""
    levels: list[tuple[int, int]] = []
    while shape := file.vae_shape(f"encoder.down.{len(levels)}.block.0.conv1.weight"):
        layers = 1
        while file.vae_shape(f"encoder.down.{len(levels)}.block.{layers}.conv1.weight"):
            layers += 1
        levels.append((shape[0], layers))
    return levels


def _unet_config(file: CheckpointFile, levels: list[tuple[int, int, bool]], latent_size: int) -> dict[str, Any]:
    channels = [channels for channels, *_ in levels]
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for *_, attention in levels]
    heads = [width // HEAD_SIZE for width in channels] if file.version == 2 else UNET_HEADS
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latent_size,
        "in_channels": _size(file.unet_shape("input_blocks.0.0.weight"), 1),
        "out_channels": _size(file.unet_shape("out.2.weight"), 0),
        "block_out_channels": channels,
        "layers_per_block": levels[0][1],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "cross_attention_dim": _size(file.unet_shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight"), 1),
        "attention_head_dim": heads,  # despite its name the number of heads
        "norm_num_groups": NORM_GROUPS,
        "use_linear_projection": len(file.unet_shape("middle_block.1.proj_in.weight") or ()) == 2,
    }


def _vae_config(file: CheckpointFile, levels: list[tuple[int, int]], latent_size: int, scale: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": latent_size * 2 ** (len(levels) - 1),
        "in_channels": _size(file.vae_shape("encoder.conv_in.weight"), 1),
        "out_channels": _size(file.vae_shape("decoder.conv_out.weight"), 0),
        "latent_channels": _size(file.vae_shape("post_quant_conv.weight"), 0),
        "block_out_channels": [channels for channels, _ in levels],
        "layers_per_block": levels[0][1] if levels else 0,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": scale,
    }


def _text_encoder_config(file: CheckpointFile) -> dict[str, Any]:
    """OpenAI's CLIP ViT-L in 1.x; in 2.x OpenCLIP's ViT-H, whose last layer is never used."""
    prefix, is_open_clip = file.clip_prefix or "", file.version == 2
    inner, layer = ("", "transformer.resblocks.{}.mlp.c_fc.weight") if is_open_clip else (
        "embeddings.", "encoder.layers.{}.mlp.fc1.weight"
    )  # fmt: skip
    layers = 0
    while prefix + layer.format(layers) in file.shapes:
        layers += 1
    tokens = file.shapes.get(f"{prefix}{inner}token_embedding.weight")
    width = _size(tokens, 1)
    positions = f"{prefix}positional_embedding" if is_open_clip else f"{prefix}{inner}position_embedding.weight"
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": _size(tokens, 0),
        "hidden_size": width,
        "intermediate_size": _size(file.shapes.get(prefix + layer.format(0)), 0),
        "num_hidden_layers": layers - (is_open_clip and layers == OPEN_CLIP_VIT_H_LAYERS),
        "num_attention_heads": width // HEAD_SIZE,
        "max_position_embeddings": _size(file.shapes.get(positions), 0),
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "projection_dim": 512 if is_open_clip else 768,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _scheduler_config(sampling: Sampling) -> dict[str, Any]:
    """Stable Diffusion's own schedule; with zero terminal SNR that of DDIM, as PNDM has none."""
    common = {
        "num_train_timesteps": int(sampling.yaml.number("timesteps", SCHEDULE["timesteps"])),
        "beta_start": sampling.yaml.number("linear_start", SCHEDULE["linear_start"]),
        "beta_end": sampling.yaml.number("linear_end", SCHEDULE["linear_end"]),
        "beta_schedule": "scaled_linear",
        "prediction_type": sampling.prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }
    if not sampling.zero_snr:
        return {"_class_name": "PNDMScheduler", **common, "skip_prk_steps": True}
    return {
        "_class_name": "DDIMScheduler", **common, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    }  # fmt: skip


def _size(shape: Shape | None, dimension: int) -> int:
    """0 where the weight is missing, which is refused by name later."""
    return shape[dimension] if shape and len(shape) > dimension else 0
