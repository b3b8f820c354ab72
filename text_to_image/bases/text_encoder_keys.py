"""Weight names of text encoders in one-file checkpoints: CLIP's own, or OpenCLIP's with Q, K and V in one weight."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bases.ldm_keys import StateDict, replace_layer, turn_round
from runtime.errors import UserError

OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_OUTER_KEYS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
PROJECTION = "text_projection"  # in OpenCLIP's layout (in, out), in CLIP's own with `.weight` (out, in)


@dataclass(frozen=True)
class TextEncoderFormat:
    """Where a text encoder is in a file, and whose names it has there."""

    part: str  # its folder in diffusers' format
    prefixes: tuple[str, ...]  # what its keys may begin with; the first is what is written
    open_clip: bool  # OpenCLIP's layout and activation, else those of OpenAI's CLIP
    has_projection: bool = False  # whether its pooled output is used
    unused_layer: int | None = None  # the last layer of the whole model, which Stable Diffusion leaves out
    padding: str = "<|endoftext|>"  # what its tokenizer pads with

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.part.replace("text_encoder", "tokenizer")

    @property
    def tokens_key(self) -> str:
        """The name of its token embedding, without a prefix."""
        return self.inner_key("embeddings.token_embedding.weight")

    def inner_key(self, key: str) -> str:
        """The name in the file, without a prefix, of the weight that is `key` in transformers."""
        return open_clip_key_map([key])[key] if self.open_clip else key


def text_encoder_to_ldm(state_dict: StateDict, encoder: TextEncoderFormat) -> StateDict:
    """A text encoder's weights under their names in the file. UserError for a weight that it does not have there."""
    plain = {plain_key(key): weight for key, weight in state_dict.items() if not key.endswith("position_ids")}
    weights = {
        name: to_ldm_layout(name, [plain[key] for key in keys]) for name, keys in names_in_file(encoder, plain).items()
    }
    weights |= _copy_of_last_layer(weights, encoder.unused_layer)
    return {encoder.prefixes[0] + name: weight for name, weight in weights.items()}


def plain_key(key: str) -> str:
    """Older versions of transformers wrap the model in 'text_model', and so does every version with a projection."""
    return key.removeprefix("text_model.")


def names_in_file(encoder: TextEncoderFormat, keys: Iterable[str]) -> dict[str, list[str]]:
    """{name in the file, without a prefix: the plain keys of the weights it holds}, Q, K and V in this order."""
    return turn_round(open_clip_key_map(keys)) if encoder.open_clip else {key: [key] for key in keys}


def to_ldm_layout(name: str, weights: list[torch.Tensor]) -> torch.Tensor:
    joined = weights[0] if len(weights) == 1 else torch.cat(weights)
    return joined.T if is_transposed(name) else joined


def is_transposed(name: str) -> bool:
    """Whether the file holds this weight the other way round than transformers."""
    return name == PROJECTION or name.endswith(f".{PROJECTION}")


def open_clip_key_map(keys: Iterable[str]) -> dict[str, str]:
    """{CLIP key: OpenCLIP key}, without a prefix; Q, K and V share one. UserError for an unknown key."""
    return {key: OPEN_CLIP_OUTER_KEYS.get(key) or _open_clip_layer_key(key) for key in keys}


def _open_clip_layer_key(key: str) -> str:
    if key == f"{PROJECTION}.weight":
        return PROJECTION
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", key)
    if not match:
        raise UserError(f"its text encoder has {key}, which OpenCLIP's does not have")
    number, rest = match.groups()
    if re.match(r"self_attn\.[qkv]_proj\.", rest):
        return f"transformer.resblocks.{number}.attn.in_proj_{rest.rpartition('.')[2]}"
    return f"transformer.resblocks.{number}.{replace_layer(rest, OPEN_CLIP_LAYERS)}"


def _copy_of_last_layer(weights: StateDict, unused_layer: int | None) -> StateDict:
    """The unused layer as a copy of the one before, where a model has all but that: other programs build the whole
    model and expect weights for it too."""
    if unused_layer is None:
        return {}
    first, last = (f"transformer.resblocks.{number}." for number in (unused_layer - 1, unused_layer))
    if any(key.startswith(last) for key in weights):
        return {}
    return {last + key.removeprefix(first): weights[key].clone() for key in weights if key.startswith(first)}
