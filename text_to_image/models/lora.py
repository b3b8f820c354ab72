"""A LoRA on the UNet (arXiv:2106.09685): its configuration, and the file that diffusers reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from models.folders import loading_errors
from runtime.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
DOWN_KEY = re.compile(r"unet\.(?P<layer>.+)\.(lora\.down|lora_A)\.weight")
# Other adapters under kohya's names. diffusers drops the one and refuses the rest without saying why.
OTHER_ADAPTERS = {".dora_scale": "DoRA", ".lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr"}
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the attention's projections, as in diffusers' example


class LoraLayer(NamedTuple):
    """What a LoRA adds to one layer's weight (out, in): alpha / rank * up @ down."""

    down: torch.Tensor  # (rank, in)
    up: torch.Tensor  # (out, rank)
    alpha: float


def lora_config(rank: int, alpha: float) -> LoraConfig:
    """What `unet.add_adapter` takes. UserError if peft is not installed."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora_rank needs peft: `pip install peft`") from None
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)


def write_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the UNet's adapter to the file that `pipeline.load_lora_weights` reads, alpha included."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    adapter = unet.peft_config["default"].to_dict()
    adapter = {name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state, safe_serialization=True, unet_lora_adapter_metadata=adapter
    )


def read_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Loads a file of `write_lora` into the adapter that `unet` already has."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import set_peft_model_state_dict

    state = {name.removeprefix("unet."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
    result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), adapter_name="default")
    assert not result.unexpected_keys


def read_lora_layers(file: Path) -> dict[str, LoraLayer]:
    """{name of a layer of the UNet: what is added to it} from a file of `write_lora`. UserError for another file."""
    with loading_errors(file.parent, file.name), safe_open(file, "pt") as opened:
        names = list(opened.keys())
        adapter = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        return lora_layers({name: opened.get_tensor(name) for name in names}, adapter.get("unet.lora_alpha"))


def lora_layers(state: dict[str, torch.Tensor], alpha: float | None) -> dict[str, LoraLayer]:
    """As `read_lora_layers`, of a file's tensors. Without `alpha` it is the rank, as diffusers has it.

    ValueError if a name is not one of `write_lora`.
    """
    downs = {name: match["layer"] for name in state if (match := DOWN_KEY.fullmatch(name))}
    ups = {name: name.replace(".lora.down.", ".lora.up.").replace(".lora_A.", ".lora_B.") for name in downs}
    if unknown := state.keys() ^ {*downs, *ups.values()}:
        raise ValueError(f"not a LoRA that was trained here, as it has {min(unknown)}")
    return {
        layer: LoraLayer(state[name], state[ups[name]], alpha or len(state[name])) for name, layer in downs.items()
    }


def refuse_other_adapters(file: Path) -> None:
    """UserError that says what the file is where it is not a plain LoRA."""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    for part, kind in OTHER_ADAPTERS.items():
        if found := next((name for name in names if part in name), None):
            raise UserError(f"{file}: a {kind} adapter ({found}); only plain LoRAs can be used")


def refuse_other_bases(file: Path, state: dict[str, torch.Tensor], unet: UNet2DConditionModel) -> None:
    """UserError where layers of the LoRA `state`, under diffusers' names, have no place in `unet`.

    diffusers leaves such layers out as long as one of the others has a place.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet_state = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    if unet_state and not any(".lora_A." in name for name in unet_state):
        unet_state = convert_unet_state_dict_to_peft(unet_state)
    linears_and_convs = (torch.nn.Linear, torch.nn.Conv2d)
    widths = {name: m.weight.shape[1] for name, m in unet.named_modules() if isinstance(m, linears_and_convs)}
    for name, down in unet_state.items():
        layer, is_down, _ = name.removeprefix("unet.").partition(".lora_A.")
        if is_down and layer not in widths:
            raise UserError(f"{file}: for another base: this model has no {layer}")
        if is_down and down.shape[1] != widths[layer]:
            raise UserError(
                f"{file}: for another base: {layer} takes {down.shape[1]} values, in this model {widths[layer]}"
            )


def fuse_into_text_encoder(text_encoder: CLIPTextModel) -> None:
    """Adds the loaded adapter to the weights that it stands beside and takes it off, so that another can follow."""
    from diffusers.loaders.lora_base import fuse_text_encoder_lora
    from diffusers.utils import recurse_remove_peft_layers

    fuse_text_encoder_lora(text_encoder)
    recurse_remove_peft_layers(text_encoder)
    del text_encoder.peft_config
    text_encoder._hf_peft_config_loaded = False
