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

from models.folders import loading_errors
from runtime.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
DOWN_KEY = re.compile(r"unet\.(?P<layer>.+)\.(lora\.down|lora_A)\.weight")
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
