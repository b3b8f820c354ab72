"""The configs that diffusers needs of a one-file checkpoint, from the shapes of its weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bases.checkpoint_files import CheckpointFile, Sampling, Shape
from bases.text_encoder_keys import TextEncoderFormat
from runtime.errors import UserError

# Of all Stable Diffusion models, and not to be seen in the weights.
NORM_GROUPS, HEAD_SIZE, TIME_IDS = 32, 64, 6
SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}


class Level(NamedTuple):
    """One level of the UNet or the VAE."""

    channels: int
    layers: int
    depth: int = 0  # transformer blocks of each attention; 0 where it has none


def make_configs(file: CheckpointFile, sampling: Sampling, asked: str) -> dict[str, dict[str, Any]]:
    """{part: its config in diffusers' format}. UserError where the layers are not built as Stable Diffusion's are."""
    unet_levels, vae_levels = _unet_levels(file), _vae_levels(file)
    texts = {encoder.part: _text_encoder_config(file, encoder) for encoder in file.family.text_encoders}
    widths = [text["hidden_size"] for text in texts.values()]
    _check_layers(file, unet_levels, vae_levels, widths, asked)
    latent_size = _latent_size(file, sampling)
    unet = _unet_config(file, unet_levels, latent_size) | _size_conditions(file, texts, asked)
    vae = _vae_config(file, vae_levels, latent_size, sampling.yaml.number("scale_factor", file.family.vae_scale))
    if unet["cross_attention_dim"] != sum(widths):
        raise UserError(
            f"{asked}: its UNet reads text embeddings of {unet['cross_attention_dim']} numbers, its text encoder "
            f"makes {sum(widths)}: they do not belong together"
        )
    return {"unet": unet, "vae": vae, **texts, "scheduler": _scheduler_config(file, sampling)}


def _check_layers(
    file: CheckpointFile, unet_levels: list[Level], vae_levels: list[Level], text_widths: list[int], asked: str
) -> None:
    """The weights do not show how many heads and groups share a layer; in Stable Diffusion's own sizes it is known."""
    widths = [level.channels for level in (*unet_levels, *vae_levels)]
    heads = list(text_widths)
    if not file.family.unet_heads:
        heads += [level.channels for level in unet_levels if level.depth] + [unet_levels[-1].channels]
    layers = [{level.layers for level in levels} for levels in (unet_levels, vae_levels)]
    fits = all(w and w % NORM_GROUPS == 0 for w in widths) and all(w and w % HEAD_SIZE == 0 for w in heads)
    if not fits or any(len(counts) != 1 for counts in layers):
        sizes = f"{', '.join(map(str, widths))} channels, text embeddings of {sum(text_widths)} numbers"
        raise UserError(
            f"{asked}: its layers are not built as Stable Diffusion's are ({sizes}), so the file does not say how "
            "they work; a folder in diffusers' format is needed"
        )


def _latent_size(file: CheckpointFile, sampling: Sampling) -> int:
    """What the .yaml says, but for 64: the one that came with the 2.x models for 768 px says so without meaning it."""
    family = file.family
    own = family.velocity_latent_size if sampling.prediction_type == "v_prediction" else family.latent_size
    stated = int(sampling.yaml.number("image_size", 64))
    return own if stated == 64 else stated


def _unet_levels(file: CheckpointFile) -> list[Level]:
    """From the list `input_blocks`."""
    levels, n = [Level(0, 0)], 1
    while True:
        block = f"input_blocks.{n}.0"
        if shape := file.unet_shape(f"{block}.in_layers.2.weight") or file.unet_shape(f"{block}.in_layers.2.bias"):
            levels[-1] = Level(shape[0], levels[-1].layers + 1, _attention_depth(file, f"input_blocks.{n}.1"))
        elif file.unet_shape(f"{block}.op.weight") or file.unet_shape(f"{block}.op.bias"):
            levels.append(Level(0, 0))
        else:
            return levels
        n += 1


def _attention_depth(file: CheckpointFile, attention: str) -> int:
    """How many transformer blocks it has, told by any of their first weights; 0 if it is none."""
    if file.unet_shape(f"{attention}.proj_in.weight") is None:
        return 0
    depth, told_by = 1, ("norm1.weight", "norm1.bias", "attn1.to_q.weight")
    while any(file.unet_shape(f"{attention}.transformer_blocks.{depth}.{name}") for name in told_by):
        depth += 1
    return depth


def _vae_levels(file: CheckpointFile) -> list[Level]:
    """Of the encoder."""
    levels: list[Level] = []
    while shape := file.vae_shape(f"encoder.down.{len(levels)}.block.0.conv1.weight"):
        layers = 1
        while file.vae_shape(f"encoder.down.{len(levels)}.block.{layers}.conv1.weight"):
            layers += 1
        levels.append(Level(shape[0], layers))
    return levels


def _unet_config(file: CheckpointFile, levels: list[Level], latent_size: int) -> dict[str, Any]:
    channels = [level.channels for level in levels]
    down = ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latent_size,
        "in_channels": _size(file.unet_shape("input_blocks.0.0.weight"), 1),
        "out_channels": _size(file.unet_shape("out.2.weight"), 0),
        "block_out_channels": channels,
        "layers_per_block": levels[0].layers,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "cross_attention_dim": _size(file.unet_shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight"), 1),
        # Despite its name the number of heads.
        "attention_head_dim": file.family.unet_heads or [max(1, width // HEAD_SIZE) for width in channels],
        "norm_num_groups": NORM_GROUPS,
        "use_linear_projection": len(file.unet_shape("middle_block.1.proj_in.weight") or ()) == 2,
        **_attention_depths(levels),
    }


def _attention_depths(levels: list[Level]) -> dict[str, Any]:
    """Nothing where every attention has one transformer block, as in Stable Diffusion 1.x and 2.x."""
    depths = [max(1, level.depth) for level in levels]
    return {"transformer_layers_per_block": depths} if max(depths) > 1 else {}


def _size_conditions(file: CheckpointFile, texts: Mapping[str, dict[str, Any]], asked: str) -> dict[str, Any]:
    """What XL's UNet is given beside the text: pooled text, and an embedding of each of six numbers."""
    if not file.family.has_size_conditions:
        return {}
    width, pooled = _size(file.unet_shape("label_emb.0.0.weight"), 1), [*texts.values()][-1]["projection_dim"]
    time_dim, rest = divmod(width - pooled, TIME_IDS)
    if time_dim < 1 or rest:
        raise UserError(
            f"{asked}: its UNet's label_emb reads {width} numbers, which are not the {pooled} of the pooled text and "
            f"{TIME_IDS} sizes: they do not belong together"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_dim,
        "projection_class_embeddings_input_dim": width,
    }


def _vae_config(file: CheckpointFile, levels: list[Level], latent_size: int, scale: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": latent_size * 2 ** (len(levels) - 1),
        "in_channels": _size(file.vae_shape("encoder.conv_in.weight"), 1),
        "out_channels": _size(file.vae_shape("decoder.conv_out.weight"), 0),
        "latent_channels": _size(file.vae_shape("post_quant_conv.weight"), 0),
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": levels[0].layers if levels else 0,
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": scale,
    }


def _text_encoder_config(file: CheckpointFile, encoder: TextEncoderFormat) -> dict[str, Any]:
    """OpenAI's CLIP ViT-L in 1.x; in 2.x OpenCLIP's ViT-H, whose last layer is never used; XL has ViT-L and bigG."""
    layers = 0
    while file.text_shape(encoder, f"encoder.layers.{layers}.mlp.fc1.weight"):
        layers += 1
    tokens = file.text_shape(encoder, "embeddings.token_embedding.weight")
    width = _size(tokens, 1)
    return {
        "architectures": ["CLIPTextModelWithProjection" if encoder.has_projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": _size(tokens, 0),
        "hidden_size": width,
        "intermediate_size": _size(file.text_shape(encoder, "encoder.layers.0.mlp.fc1.weight"), 0),
        "num_hidden_layers": layers - (layers - 1 == encoder.unused_layer),
        "num_attention_heads": width // HEAD_SIZE,
        "max_position_embeddings": _size(file.text_shape(encoder, "embeddings.position_embedding.weight"), 0),
        "hidden_act": "gelu" if encoder.open_clip else "quick_gelu",
        "projection_dim": _projection_dim(file, encoder),
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _projection_dim(file: CheckpointFile, encoder: TextEncoderFormat) -> int:
    """The length of the pooled text; where that is not used, as it is in the models on the hub."""
    if not encoder.has_projection:
        return 512 if encoder.open_clip else 768
    name = file.projection_name(encoder)
    return _size(file.shapes.get(name), 0 if name.endswith(".weight") else 1)


def _scheduler_config(file: CheckpointFile, sampling: Sampling) -> dict[str, Any]:
    """The family's own schedule; with zero terminal SNR one that has it."""
    scheduler = file.family.zero_snr_scheduler if sampling.zero_snr else file.family.scheduler
    return {
        "_class_name": scheduler.class_name,
        "num_train_timesteps": int(sampling.yaml.number("timesteps", SCHEDULE["timesteps"])),
        "beta_start": sampling.yaml.number("linear_start", SCHEDULE["linear_start"]),
        "beta_end": sampling.yaml.number("linear_end", SCHEDULE["linear_end"]),
        "beta_schedule": "scaled_linear",
        "prediction_type": sampling.prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        **scheduler.settings,
    }


def _size(shape: Shape | None, dimension: int) -> int:
    """0 where the weight is missing, which is refused by name later."""
    return shape[dimension] if shape and len(shape) > dimension else 0
