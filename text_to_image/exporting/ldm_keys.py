"""The names that weights have in a one-file checkpoint, Stable Diffusion's original layout, from diffusers' names.

The UNet there is flat lists of places: input_blocks, middle_block, output_blocks. Where a block of diffusers begins in
them follows from the number of layers of those before, so any depth has its names.
"""

import re
from collections.abc import Iterable, Iterator

import torch

from runtime.errors import UserError

Weights = dict[str, torch.Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
VIT_H_LAYERS = 24  # of OpenCLIP's ViT-H, of which Stable Diffusion 2 reads all but the last


def unet_weights(weights: Weights) -> Weights:
    names = unet_names(weights)
    return {UNET + names[name]: weight for name, weight in weights.items()}


def vae_weights(weights: Weights) -> Weights:
    """The attention's projections become convolutions over one pixel."""
    renamed = {}
    for name, original in vae_names(weights).items():
        weight = weights[name]
        is_projection = ".attn_1." in original and weight.dim() == 2
        renamed[VAE + original] = weight[:, :, None, None] if is_projection else weight
    return renamed


def text_weights(weights: Weights, open_clip: bool) -> Weights:
    """CLIP's as they are (SD 1.x), or in the layout of OpenCLIP (SD 2.x), whose attention has Q, K and V in one."""
    # Older versions of transformers name an outer 'text_model' and keep the positions' numbers among the weights.
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    plain = {name: weight for name, weight in plain.items() if not name.endswith("position_ids")}
    if not open_clip:
        return {CLIP + name: weight for name, weight in plain.items()}
    return {OPEN_CLIP + name: weight for name, weight in _open_clip_weights(plain)}


# --- UNet -----------------------------------------------------------------------------------------------------------


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """{diffusers' name: original name} of all weights; UserError for one that the original UNet does not have."""
    names = list(names)
    places = _Places(names)
    return {name: _unet_end(name) or places.name_of(name) for name in names}


def _unet_end(name: str) -> str | None:
    layer, _, kind = name.rpartition(".")
    return f"{UNET_ENDS[layer]}.{kind}" if layer in UNET_ENDS else None


class _Places:
    """Where the layers of a UNet's blocks stand in the original's lists."""

    def __init__(self, names: Iterable[str]):
        found = [match for name in names if (match := _in_block(name))]
        self.layers = {match["block"]: 0 for match in found}
        for match in found:
            if match["kind"] == "resnets":
                self.layers[match["block"]] = max(self.layers[match["block"]], int(match["layer"]) + 1)
        self.with_attention = {match["block"] for match in found if match["kind"] == "attentions"}
        self.with_downsampler = {match["block"] for match in found if match["kind"] == "downsamplers"}

    def name_of(self, name: str) -> str:
        match = _in_block(name)
        if not match:
            raise UserError(f"its UNet has {name}, which Stable Diffusion 1.x and 2.x do not have")
        block, kind, layer, rest = match["block"], match["kind"], int(match["layer"]), match["rest"]
        rest = _renamed_start(rest, RESNET) if kind == "resnets" else rest  # inside, attention has the same names
        if block == "mid_block":
            return f"middle_block.{2 * layer + (kind == 'attentions')}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{self._start(block) + self.layers[block]}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":  # after the last layer's resnet and attention, in one place with them
            last = self._start(block) + self.layers[block] - 1
            return f"output_blocks.{last}.{1 + (block in self.with_attention)}.{rest}"
        blocks = "input_blocks" if block.startswith("down") else "output_blocks"
        return f"{blocks}.{self._start(block) + layer}.{int(kind == 'attentions')}.{rest}"

    def _start(self, block: str) -> int:
        """The place of the block's first layer. Downsamplers have places of their own, and conv_in has the first."""
        side, _, number = block.rpartition(".")
        before = [f"{side}.{i}" for i in range(int(number))]
        return (side == "down_blocks") + sum(self.layers[b] + (b in self.with_downsampler) for b in before)


def _in_block(name: str) -> re.Match | None:
    kinds = "resnets|attentions|downsamplers|upsamplers"
    block = r"(?P<block>down_blocks\.\d+|up_blocks\.\d+|mid_block)"
    return re.fullmatch(rf"{block}\.(?P<kind>{kinds})\.(?P<layer>\d+)\.(?P<rest>.+)", name)


def _renamed_start(name: str, renamed: dict[str, str]) -> str:
    """`name` with its first words exchanged; as it is where none of `renamed` begins it."""
    start = next((words for words in renamed if name.startswith(f"{words}.")), None)
    return renamed[start] + name.removeprefix(start) if start else name


# --- VAE ------------------------------------------------------------------------------------------------------------


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """As `unet_names`. The original counts the decoder's blocks from the picture, diffusers from the latent."""
    names = list(names)
    ups = [int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))]
    return {name: _vae_name(name, max(ups, default=0)) for name in names}


def _vae_name(name: str, last_up: int) -> str:
    if re.match(r"((en|de)coder\.(conv_in|conv_out)|quant_conv|post_quant_conv)\.", name):
        return name
    if match := re.fullmatch(r"((?:en|de)coder)\.conv_norm_out\.(.+)", name):
        return f"{match[1]}.norm_out.{match[2]}"
    if match := re.fullmatch(r"((?:en|de)coder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        coder, kind, layer, rest = match.groups()
        if kind == "attentions":
            return f"{coder}.mid.attn_{int(layer) + 1}.{_renamed_start(rest, VAE_ATTENTION)}"
        return f"{coder}.mid.block_{int(layer) + 1}.{_vae_resnet(rest)}"
    if match := re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", name):
        blocks, block, layer, rest = match.groups()
        return f"{blocks}.{_vae_block(blocks, block, last_up)}.block.{layer}.{_vae_resnet(rest)}"
    if match := re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(down|up)samplers\.0\.(.+)", name):
        blocks, block, kind, rest = match.groups()
        return f"{blocks}.{_vae_block(blocks, block, last_up)}.{kind}sample.{rest}"
    raise UserError(f"its VAE has {name}, which Stable Diffusion 1.x and 2.x do not have")


def _vae_block(blocks: str, number: str, last_up: int) -> int:
    return int(number) if blocks == "encoder.down" else last_up - int(number)


def _vae_resnet(rest: str) -> str:
    return _renamed_start(rest, {"conv_shortcut": "nin_shortcut"})


# --- text encoder ---------------------------------------------------------------------------------------------------


def _open_clip_weights(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    layers: dict[int, Weights] = {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight
        elif name in OPEN_CLIP_ENDS:
            yield OPEN_CLIP_ENDS[name], weight
        else:
            raise UserError(f"its text encoder has {name}, which OpenCLIP's does not have")
    if len(layers) == VIT_H_LAYERS - 1:
        # Other programs build the whole ViT-H and want weights for the layer that is never used.
        layers[VIT_H_LAYERS - 1] = {name: weight.clone() for name, weight in layers[VIT_H_LAYERS - 2].items()}
    for number, layer in layers.items():
        for name, weight in _open_clip_layer(layer):
            yield f"transformer.resblocks.{number}.{name}", weight


def _open_clip_layer(layer: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("weight", "bias"):
        yield f"attn.in_proj_{kind}", torch.cat([layer[f"self_attn.{which}_proj.{kind}"] for which in "qkv"])
    for name, weight in layer.items():
        if not re.match(r"self_attn\.[qkv]_proj\.", name):
            yield _renamed_start(name, OPEN_CLIP_LAYER), weight
