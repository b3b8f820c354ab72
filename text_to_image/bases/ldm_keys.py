"""Weight names of the original Stable Diffusion code ('LDM', one-file checkpoints), worked out from diffusers' names.

Every table and map here goes one way, {diffusers key: LDM key}. To read a file, `turn_round` a map that was built from
the keys of a diffusers model's state dict.

The LDM UNet keeps its layers in three flat lists: input_blocks, middle_block and output_blocks. The index of a layer
follows from how many layers the blocks before it have, so UNets of any depth are covered.
"""

import re
from collections.abc import Iterable

import torch

from runtime.errors import UserError

StateDict = dict[str, torch.Tensor]

# What the keys of each part begin with in the file.
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."

UNET_OUTER_LAYERS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # of XL: pooled text, sizes and crop
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
FUSED = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")  # one weight in OpenCLIP's layout
VAE_RESNET_LAYERS = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION_LAYERS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_to_ldm(state_dict: StateDict) -> StateDict:
    """The UNet's weights under their LDM keys. UserError for a weight that Stable Diffusion does not have."""
    ldm_keys = unet_key_map(state_dict)
    return {UNET_PREFIX + ldm_keys[key]: weight for key, weight in state_dict.items()}


def vae_to_ldm(state_dict: StateDict) -> StateDict:
    """As `unet_to_ldm`. The attention's linear projections (C, C) become 1x1 convolutions (C, C, 1, 1)."""
    converted = {}
    for key, ldm_key in vae_key_map(state_dict).items():
        weight = state_dict[key]
        is_projection = ".attn_1." in ldm_key and weight.dim() == 2
        converted[VAE_PREFIX + ldm_key] = weight[:, :, None, None] if is_projection else weight
    return converted


def turn_round(key_map: dict[str, str]) -> dict[str, list[str]]:
    """{LDM key: the diffusers keys of the weights it holds}: one key, or Q, K and V in the order of their fusion."""
    turned: dict[str, list[str]] = {}
    for key in sorted(key_map, key=lambda key: [part not in key for part in FUSED]):
        turned.setdefault(key_map[key], []).append(key)
    return turned


# --- UNet -----------------------------------------------------------------------------------------------------------


def unet_key_map(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers key: LDM key}, without UNET_PREFIX. `keys` are all keys of the UNet's state dict, as the number of
    layers is counted from them. UserError for a key that the LDM UNet does not have."""
    keys = list(keys)
    blocks = _UNetBlocks(keys)
    return {key: _outer_unet_key(key) or blocks.ldm_key(key) for key in keys}


def _outer_unet_key(key: str) -> str | None:
    layer, _, parameter = key.rpartition(".")
    return f"{UNET_OUTER_LAYERS[layer]}.{parameter}" if layer in UNET_OUTER_LAYERS else None


class _UNetBlocks:
    """How many layers each diffusers block has, and so the index of each layer in the LDM's flat lists."""

    def __init__(self, keys: Iterable[str]):
        matches = [match for key in keys if (match := _match_block(key))]
        self.resnets = {match["block"]: 0 for match in matches}
        for match in matches:
            if match["kind"] == "resnets":
                self.resnets[match["block"]] = max(self.resnets[match["block"]], int(match["layer"]) + 1)
        self.with_attention = {match["block"] for match in matches if match["kind"] == "attentions"}
        self.with_downsampler = {match["block"] for match in matches if match["kind"] == "downsamplers"}

    def ldm_key(self, key: str) -> str:
        match = _match_block(key)
        if not match:
            raise UserError(f"its UNet has {key}, which Stable Diffusion 1.x, 2.x and XL do not have")
        block, kind, layer, rest = match["block"], match["kind"], int(match["layer"]), match["rest"]
        if kind == "resnets":  # inside an attention block both layouts use the same names
            rest = replace_layer(rest, UNET_RESNET_LAYERS)
        if block == "mid_block":  # resnet, attention, resnet
            return f"middle_block.{2 * layer + (kind == 'attentions')}.{rest}"
        if kind == "downsamplers":  # an entry of its own after the block's layers
            return f"input_blocks.{self._first_index(block) + self.resnets[block]}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":  # in the same entry as the block's last resnet and attention
            last = self._first_index(block) + self.resnets[block] - 1
            return f"output_blocks.{last}.{1 + (block in self.with_attention)}.{rest}"
        ldm_list = "input_blocks" if block.startswith("down") else "output_blocks"
        return f"{ldm_list}.{self._first_index(block) + layer}.{int(kind == 'attentions')}.{rest}"

    def _first_index(self, block: str) -> int:
        """The index of the block's first layer. In input_blocks conv_in takes index 0."""
        side, _, number = block.rpartition(".")
        before = [f"{side}.{i}" for i in range(int(number))]
        return (side == "down_blocks") + sum(self.resnets[b] + (b in self.with_downsampler) for b in before)


def _match_block(key: str) -> re.Match | None:
    kinds = "resnets|attentions|downsamplers|upsamplers"
    block = r"(?P<block>down_blocks\.\d+|up_blocks\.\d+|mid_block)"
    return re.fullmatch(rf"{block}\.(?P<kind>{kinds})\.(?P<layer>\d+)\.(?P<rest>.+)", key)


def replace_layer(key: str, layers: dict[str, str]) -> str:
    """`key` with the layer name that it begins with replaced; unchanged if it begins with none of `layers`."""
    layer = next((layer for layer in layers if key.startswith(f"{layer}.")), None)
    return layers[layer] + key.removeprefix(layer) if layer else key


# --- VAE ------------------------------------------------------------------------------------------------------------


def vae_key_map(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers key: LDM key}, without VAE_PREFIX. UserError for a key that the LDM VAE does not have.

    The LDM counts the decoder's blocks from the pixels, diffusers counts them from the latents.
    """
    keys = list(keys)
    up_blocks = [int(match[1]) for key in keys if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))]
    return {key: _vae_key(key, max(up_blocks, default=0)) for key in keys}


def _vae_key(key: str, last_up_block: int) -> str:
    if re.match(r"((en|de)coder\.(conv_in|conv_out)|quant_conv|post_quant_conv)\.", key):
        return key
    if match := re.fullmatch(r"((?:en|de)coder)\.conv_norm_out\.(.+)", key):
        return f"{match[1]}.norm_out.{match[2]}"
    if match := re.fullmatch(r"((?:en|de)coder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
        coder, kind, layer, rest = match.groups()
        if kind == "attentions":
            return f"{coder}.mid.attn_{int(layer) + 1}.{replace_layer(rest, VAE_ATTENTION_LAYERS)}"
        return f"{coder}.mid.block_{int(layer) + 1}.{replace_layer(rest, VAE_RESNET_LAYERS)}"
    if match := re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.+)", key):
        blocks, number, rest = match.groups()
        index = int(number) if blocks == "encoder.down" else last_up_block - int(number)
        if match := re.fullmatch(r"resnets\.(\d+)\.(.+)", rest):
            return f"{blocks}.{index}.block.{match[1]}.{replace_layer(match[2], VAE_RESNET_LAYERS)}"
        if match := re.fullmatch(r"(down|up)samplers\.0\.(.+)", rest):
            return f"{blocks}.{index}.{match[1]}sample.{match[2]}"
    raise UserError(f"its VAE has {key}, which Stable Diffusion 1.x, 2.x and XL do not have")
