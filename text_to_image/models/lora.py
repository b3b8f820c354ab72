"""A LoRA on the UNet (arXiv:2106.09685): its configuration, and the file that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from runtime.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the attention's projections, as in diffusers' example


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
