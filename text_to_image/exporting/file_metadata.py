"""What a one-file checkpoint says of itself: its modelspec metadata, and the .yaml beside it for AUTOMATIC1111."""

import datetime
import json
from dataclasses import dataclass

import yaml

from models.folders import FolderLike, ModelShape, loading_errors, read_shape
from runtime.errors import UserError

OWN_SIZES = {  # what other programs take for granted; the text encoder's follow from the UNet's
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
}
READ_WIDTH = {1: 768, 2: 1024}  # of the text embeddings
IMPLEMENTATION = {
    1: "https://github.com/CompVis/stable-diffusion",
    2: "https://github.com/Stability-AI/stablediffusion",
}
SPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
LDM_PREDICTION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Kind:
    """Of what kind a model is, from its configs and, for a LoRA's base, from what the LoRA was trained for."""

    configs: dict[str, dict]  # unet, vae, text_encoder, scheduler
    shape: ModelShape
    prediction_type: str
    zero_snr: bool

    @property
    def version(self) -> int:
        """2 where the text encoder is OpenCLIP's, else 1: OpenAI's CLIP has an activation of its own."""
        return 1 if self.configs["text_encoder"].get("hidden_act", "quick_gelu") == "quick_gelu" else 2

    @property
    def architecture(self) -> str:
        if self.version == 1:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if self.prediction_type == "v_prediction" else "stable-diffusion-v2-512"

    @property
    def has_own_sizes(self) -> bool:
        """Whether it is as large as Stable Diffusion itself: other programs load nothing else."""
        same = all(
            self.configs[part].get(name) == value for part, sizes in OWN_SIZES.items() for name, value in sizes.items()
        )
        return same and self.configs["unet"].get("cross_attention_dim") == READ_WIDTH[self.version]


def kind_of(folder: FolderLike, told: dict) -> Kind:
    """`told` are the arguments of the run that trained a LoRA on `folder`, else empty.

    UserError where it is no Stable Diffusion 1.x or 2.x.
    """
    shape = read_shape(folder)
    configs = {part: _read_config(folder, part) for part in ("unet", "vae", "text_encoder")}
    configs["scheduler"] = _read_config(folder, "scheduler", "scheduler_config.json")
    prediction = told.get("prediction_type") or configs["scheduler"].get("prediction_type", "epsilon")
    if prediction not in SPEC_PREDICTION:
        raise UserError(f"{folder}: prediction type {prediction!r} is none that Stable Diffusion's format knows")
    zero_snr = told.get("rescale_betas_zero_snr") or configs["scheduler"].get("rescale_betas_zero_snr", False)
    return Kind(configs, shape, prediction, bool(zero_snr))


def _read_config(folder: FolderLike, part: str, name: str = "config.json") -> dict:
    with loading_errors(folder, part):
        return json.loads((folder / part / name).read_text(encoding="utf-8"))


def modelspec(kind: Kind, run: dict, title: str) -> dict[str, str]:
    """The metadata of ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec), all but the hash of the weights.

    `run` is what the model's run.json says, empty where it has none.
    """
    side = kind.shape.native_size
    sizes = run.get("sizes") or [{"height": side, "width": side, "pictures": 0}]
    usual = max(sizes, key=lambda size: size["pictures"])
    date = run.get("finished_at") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    trigger = run.get("arguments", {}).get("trigger")
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": kind.architecture,
        "implementation": IMPLEMENTATION[kind.version],
        "title": title,
        "resolution": f"{usual['width']}x{usual['height']}",
        "prediction_type": SPEC_PREDICTION[kind.prediction_type],
        "date": date,
        **({"trigger_phrase": trigger} if trigger else {}),
    }
    return {f"modelspec.{name}": value for name, value in fields.items()}


def ldm_config(kind: Kind) -> str | None:
    """The .yaml that AUTOMATIC1111 needs beside the file, None where it needs none or none can say what the model is.

    It takes a file for SD 1.x that predicts noise unless it finds out otherwise; of SD 2.x it guesses the prediction.
    """
    if kind.version == 1 and kind.prediction_type == "epsilon":
        return None
    unet, vae = (_multiples(kind.configs[part]["block_out_channels"]) for part in ("unet", "vae"))
    if not unet or not vae or kind.configs["scheduler"].get("beta_schedule") != "scaled_linear":
        return None
    return yaml.safe_dump({"model": _latent_diffusion(kind, unet, vae)}, sort_keys=False)


def _multiples(channels: list[int]) -> list[int] | None:
    """By what the first level's channels are multiplied at each level; None where it is no whole number."""
    return None if any(c % channels[0] for c in channels) else [c // channels[0] for c in channels]


def _latent_diffusion(kind: Kind, unet_multiples: list[int], vae_multiples: list[int]) -> dict:
    scheduler, vae = kind.configs["scheduler"], kind.configs["vae"]
    params = {
        "parameterization": LDM_PREDICTION[kind.prediction_type],
        "linear_start": scheduler["beta_start"],
        "linear_end": scheduler["beta_end"],
        "timesteps": scheduler["num_train_timesteps"],
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": kind.shape.native_size // kind.shape.vae_factor,
        "channels": kind.shape.latent_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": _unet_config(kind, unet_multiples),
        "first_stage_config": _vae_config(kind, vae_multiples),
        "cond_stage_config": _text_config(kind.version),
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _unet_config(kind: Kind, multiples: list[int]) -> dict:
    unet = kind.configs["unet"]
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]  # the latter is the number of heads, too
    first = unet["block_out_channels"][0]
    params = {
        "image_size": 32,  # unused
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": first,
        "attention_resolutions": [2**level for level in reversed(kind.shape.attention_levels)],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": multiples,
        **({"num_head_channels": first // heads[0]} if isinstance(heads, list) else {"num_heads": heads}),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae_config(kind: Kind, multiples: list[int]) -> dict:
    vae = kind.configs["vae"]
    ddconfig = {
        "double_z": True,
        "z_channels": vae["latent_channels"],
        "resolution": kind.shape.native_size,
        "in_channels": vae["in_channels"],
        "out_ch": vae["out_channels"],
        "ch": vae["block_out_channels"][0],
        "ch_mult": multiples,
        "num_res_blocks": vae["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    params = {"embed_dim": vae["latent_channels"], "ddconfig": ddconfig, "lossconfig": loss}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def _text_config(version: int) -> dict:
    if version == 1:
        return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    params = {"freeze": True, "layer": "penultimate"}
    return {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
