"""What a one-file checkpoint or LoRA says about itself: its metadata, and the .yaml that AUTOMATIC1111 reads."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bases.checkpoint_files import LDM_PARAMETERIZATION, MODELSPEC_PREDICTION
from bases.families import SD1, SD2, XL, Family, family_of_folder
from metadata.picture_names import distinct_names
from models.folders import FolderLike, ModelShape, loading_errors, read_index, read_shape
from models.loading import TEXT_ENCODERS
from models.lora import LoraLayer
from runtime.errors import UserError


@dataclass(frozen=True)
class PublishedModel:
    """What other programs know of a family. They build its own architecture and load no other."""

    architecture: str  # ModelSpec's name of it
    velocity_architecture: str  # the same where it predicts velocity
    implementation: str
    kohya_version: str  # `ss_base_model_version`
    kohya_velocity_version: str
    sizes: Mapping[str, Mapping[str, Any]]  # of the configs; the text encoders' follow from cross_attention_dim
    kohya_uses_ldm_names: bool = False  # in LoRAs, for the UNet's layers; else diffusers' names
    yaml_text_encoder: Mapping[str, Any] | None = None  # its place in the .yaml for AUTOMATIC1111; None: it needs none


VAE_SIZES = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
FOUR_LEVELS = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
XL_LEVELS = {
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
}
PUBLISHED = {
    SD1: PublishedModel(
        architecture="stable-diffusion-v1",
        velocity_architecture="stable-diffusion-v1",
        implementation="https://github.com/CompVis/stable-diffusion",
        kohya_version="sd_v1",
        kohya_velocity_version="sd_v1",
        sizes={"unet": {**FOUR_LEVELS, "cross_attention_dim": 768}, "vae": VAE_SIZES},
        yaml_text_encoder={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    ),
    SD2: PublishedModel(
        architecture="stable-diffusion-v2-512",
        velocity_architecture="stable-diffusion-v2-768-v",
        implementation="https://github.com/Stability-AI/stablediffusion",
        kohya_version="sd_v2",
        kohya_velocity_version="sd_v2_v",
        sizes={"unet": {**FOUR_LEVELS, "cross_attention_dim": 1024}, "vae": VAE_SIZES},
        yaml_text_encoder={
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
    ),
    XL: PublishedModel(
        architecture="stable-diffusion-xl-v1-base",
        velocity_architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
        kohya_version="sdxl_base_v1-0",
        kohya_velocity_version="sdxl_base_v1-0",
        sizes={"unet": XL_LEVELS, "vae": VAE_SIZES},
        kohya_uses_ldm_names=True,
    ),
}


@dataclass(frozen=True)
class CheckpointFormat:
    """Which Stable Diffusion a model is, and how it must be sampled."""

    configs: dict[str, dict]  # of unet, vae, text encoders and scheduler
    shape: ModelShape
    prediction_type: str
    zero_snr: bool
    family: Family

    @property
    def published(self) -> PublishedModel:
        return PUBLISHED[self.family]

    @property
    def predicts_velocity(self) -> bool:
        return self.prediction_type == "v_prediction"

    @property
    def architecture(self) -> str:
        """ModelSpec's name for it."""
        return self.published.velocity_architecture if self.predicts_velocity else self.published.architecture

    @property
    def has_standard_sizes(self) -> bool:
        """Whether all layers are as large as Stable Diffusion's own, so that other programs can load it."""
        return all(
            self.configs[part].get(name) == value
            for part, sizes in self.published.sizes.items()
            for name, value in sizes.items()
        )


def read_checkpoint_format(folder: FolderLike, scheduler_overrides: dict) -> CheckpointFormat:
    """Read from the configs in `folder`. UserError for an unknown prediction type.

    `scheduler_overrides` are the arguments of the run that trained a LoRA on this base, else empty; they win over the
    base's own scheduler.
    """
    shape = read_shape(folder)
    parts = [part for part in TEXT_ENCODERS if part in read_index(folder)]
    configs = {part: _read_config(folder, part) for part in ("unet", "vae", *parts)}
    family = family_of_folder(configs)
    configs["scheduler"] = _read_config(folder, "scheduler", "scheduler_config.json")
    prediction = scheduler_overrides.get("prediction_type") or configs["scheduler"].get("prediction_type", "epsilon")
    if prediction not in MODELSPEC_PREDICTION:
        known = ", ".join(MODELSPEC_PREDICTION)
        raise UserError(f"{folder}: prediction type {prediction!r} cannot be exported; known: {known}")
    key = "rescale_betas_zero_snr"
    zero_snr = scheduler_overrides.get(key) or configs["scheduler"].get(key, False)
    return CheckpointFormat(configs, shape, prediction, bool(zero_snr), family)


def _read_config(folder: FolderLike, part: str, name: str = "config.json") -> dict:
    with loading_errors(folder, part):
        return json.loads((folder / part / name).read_text(encoding="utf-8"))


def modelspec_metadata(model: CheckpointFormat, run: dict, title: str) -> dict[str, str]:
    """The metadata of ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec), except the hash of the weights.

    `run` is the content of the model's run.json, empty if it has none.
    """
    most_common = _most_common_size(model, run)
    date = run.get("finished_at") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    trigger = run.get("arguments", {}).get("trigger")
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": model.architecture,
        "implementation": model.published.implementation,
        "title": title,
        "resolution": f"{most_common['width']}x{most_common['height']}",
        "prediction_type": MODELSPEC_PREDICTION[model.prediction_type],
        "date": date,
        **({"trigger_phrase": trigger} if trigger else {}),
    }
    return {f"modelspec.{name}": value for name, value in fields.items()}


def _most_common_size(model: CheckpointFormat, run: dict) -> dict[str, int]:
    """{height, width, pictures}: pixels, and how many pictures of that size the run was trained on."""
    side = model.shape.native_size
    sizes = run.get("sizes") or [{"height": side, "width": side, "pictures": 0}]
    return max(sizes, key=lambda size: size["pictures"])


def lora_metadata(model: CheckpointFormat, run: dict, title: str, layer: LoraLayer) -> dict[str, str]:
    """ModelSpec's metadata, and those that kohya's scripts write (train_network.py), which name base and strength.

    AUTOMATIC1111 tells the version of the base by `ss_v2`, shows `ss_sd_model_name`, and offers the words in
    `ss_tag_frequency`. `layer` is one of the LoRA's, which all have the same rank and alpha.
    """
    base, rank = _shown_base(run["base_model"]), len(layer.down)
    modelspec = modelspec_metadata(model, run, title)
    modelspec["modelspec.architecture"] += "/lora"
    modelspec["modelspec.description"] = f"a LoRA of rank {rank} and alpha {layer.alpha:g} for {base}"
    size, arguments = _most_common_size(model, run), run["arguments"]
    pictures = sum(size["pictures"] for size in run.get("sizes", ()))
    published = model.published
    facts = {
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": float(layer.alpha),
        "v2": model.family is SD2,
        "base_model_version": published.kohya_velocity_version if model.predicts_velocity else published.kohya_version,
        "sd_model_name": base,
        "zero_terminal_snr": model.zero_snr,
        "output_name": title,
        "resolution": f"({size['width']}, {size['height']})",
        "num_train_images": pictures,
        "max_train_steps": run.get("steps"),
        "learning_rate": arguments.get("learning_rate"),
        "seed": run.get("seed"),
        "tag_frequency": _tag_frequency(run, pictures),
    }
    return modelspec | {f"ss_{name}": str(value) for name, value in facts.items() if value is not None}


def _shown_base(base_model: str) -> str:
    """Its hub id, or the name of its folder: the rest of a local path says nothing to others."""
    return Path(base_model).name if Path(base_model).is_absolute() else base_model


def _tag_frequency(run: dict, pictures: int) -> str | None:
    """JSON of {data set: {phrase: pictures}} for the trigger phrase; None without one."""
    if not (trigger := run["arguments"].get("trigger")):
        return None
    folders = {Path(each["folder"]): each["pictures"] for each in run.get("folders", ())}
    names = distinct_names(folders)
    counts = {names[folder]: count for folder, count in folders.items()}
    if len(counts) < 2:
        counts = {Path(run["arguments"].get("dataset") or "pictures").name: pictures}
    return json.dumps({name: {trigger: count} for name, count in counts.items()})


# --- the .yaml ------------------------------------------------------------------------------------------------------


def ldm_config_yaml(model: CheckpointFormat) -> str | None:
    """The .yaml that AUTOMATIC1111 needs beside the file; None if it needs none, or if the format cannot describe the
    model.

    Without a .yaml, AUTOMATIC1111 takes an SD 1.x file for one that predicts noise, and guesses for SD 2.x. What XL
    predicts is in the file.
    """
    if not model.published.yaml_text_encoder or (model.family is SD1 and model.prediction_type == "epsilon"):
        return None
    unet, vae = (_channel_multipliers(model.configs[part]["block_out_channels"]) for part in ("unet", "vae"))
    if not unet or not vae or model.configs["scheduler"].get("beta_schedule") != "scaled_linear":
        return None
    return yaml.safe_dump({"model": _latent_diffusion_config(model, unet, vae)}, sort_keys=False)


def _channel_multipliers(channels: list[int]) -> list[int] | None:
    """The channels of each level divided by those of the first; None where that is not a whole number."""
    return None if any(c % channels[0] for c in channels) else [c // channels[0] for c in channels]


def _latent_diffusion_config(model: CheckpointFormat, unet_multipliers: list[int], vae_multipliers: list[int]) -> dict:
    scheduler, vae = model.configs["scheduler"], model.configs["vae"]
    params = {
        "parameterization": LDM_PARAMETERIZATION[model.prediction_type],
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "timesteps": scheduler["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": model.shape.native_size // model.shape.vae_factor,
        "channels": model.shape.latent_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": _unet_config(model, unet_multipliers),
        "first_stage_config": _vae_config(model, vae_multipliers),
        "cond_stage_config": model.published.yaml_text_encoder,
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _unet_config(model: CheckpointFormat, multipliers: list[int]) -> dict:
    unet = model.configs["unet"]
    # In Stable Diffusion's configs attention_head_dim is, despite its name, the number of heads.
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    channels = unet["block_out_channels"][0]
    params = {
        "image_size": 32,  # not used
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": channels,
        "attention_resolutions": [2**level for level in reversed(model.shape.attention_levels)],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": multipliers,
        **({"num_head_channels": channels // heads[0]} if isinstance(heads, list) else {"num_heads": heads}),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae_config(model: CheckpointFormat, multipliers: list[int]) -> dict:
    vae = model.configs["vae"]
    ddconfig = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": model.shape.native_size,
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": vae["block_out_channels"][0],
        "ch_mult": multipliers,
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    params = {"embed_dim": vae["latent_channels"], "ddconfig": ddconfig, "lossconfig": loss}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
