"""Keys of XL: those of its own code, and diffusers' converters turn each one back into its own key."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bases.families import XL
from bases.ldm_keys import unet_key_map, unet_to_ldm
from bases.text_encoder_keys import text_encoder_to_ldm
from one_file_models import full_size_xl_weights
from tiny_xl import xl_unet
from unet_configs import SDXL

CLIP, OPEN_CLIP = XL.text_encoders
UNET_DEPTHS = {4: 2, 5: 2, 7: 10, 8: 10}  # transformer blocks by the place in input_blocks


def text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The pooled text of the second is not as long as its states, so a matrix that is not transposed does not fit."""
    small = {"vocab_size": 20, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return (
        CLIPTextModel(CLIPTextConfig(hidden_size=8, **small)),
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=12, projection_dim=10, hidden_act="gelu", **small)),
    )


def original_unet_keys() -> set[str]:
    """Of sd_xl_base_1.0, counted as its own code builds it: three levels of two layers, no attention in the first."""
    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    inputs = {n: n in UNET_DEPTHS for n in (1, 2, 4, 5, 7, 8)}
    outputs = {n: 10 if n < 3 else 2 if n < 6 else 0 for n in range(9)}
    layers = {"time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2"}
    layers |= {"input_blocks.0.0", "input_blocks.3.0.op", "input_blocks.6.0.op"}
    layers |= {f"output_blocks.{n}.2.conv" for n in (2, 5)}
    resnets = {f"input_blocks.{n}.0" for n in inputs} | {f"output_blocks.{n}.0" for n in outputs}
    resnets |= {"middle_block.0", "middle_block.2"}
    layers |= {f"{place}.{layer}" for place in resnets for layer in resnet}
    layers |= {f"input_blocks.{n}.0.skip_connection" for n in (4, 7)}
    layers |= {f"output_blocks.{n}.0.skip_connection" for n in outputs}
    attentions = {f"input_blocks.{n}.1": depth for n, depth in UNET_DEPTHS.items()} | {"middle_block.1": 10}
    attentions |= {f"output_blocks.{n}.1": depth for n, depth in outputs.items() if depth}
    layers |= {f"{place}.{layer}" for place in attentions for layer in ("norm", "proj_in", "proj_out")}
    blocks = {f"{place}.transformer_blocks.{i}" for place, depth in attentions.items() for i in range(depth)}
    inner = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "attn2.to_out.0"]
    layers |= {f"{block}.{layer}" for block in blocks for layer in inner}
    plain = {f"{block}.attn{i}.to_{which}.weight" for block in blocks for i in (1, 2) for which in "qkv"}
    return plain | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_the_full_unets_1680_keys_are_those_of_the_original_code_and_of_diffusers_converter():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    state_dict = unet.state_dict()
    assert set(unet_key_map(state_dict).values()) == original_unet_keys()
    found = convert_ldm_unet_checkpoint(unet_to_ldm(state_dict), unet.config)
    assert found.keys() == state_dict.keys() and len(found) == 1680
    assert all(found[name] is state_dict[name] for name in found)


def test_diffusers_turns_the_small_unet_back_into_its_own_weights():
    unet = xl_unet()
    state_dict = unet.state_dict()
    found = convert_ldm_unet_checkpoint(unet_to_ldm(state_dict), unet.config)
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], state_dict[name]) for name in found)


@pytest.mark.parametrize("encoder", [CLIP, OPEN_CLIP], ids=["CLIP", "OpenCLIP"])
def test_diffusers_turns_each_text_encoder_back_into_its_own_weights(encoder):
    model = text_encoders()[encoder is OPEN_CLIP]
    state_dict, written = model.state_dict(), text_encoder_to_ldm(model.state_dict(), encoder)
    if encoder is OPEN_CLIP:
        found = convert_open_clip_checkpoint(model, written, prefix="conditioner.embedders.1.model.")
        assert written["conditioner.embedders.1.model.text_projection"].shape == (12, 10)
        assert torch.equal(found["text_projection.weight"], state_dict["text_projection.weight"])
    else:
        found = convert_ldm_clip_checkpoint(written)
    found = {name.removeprefix("text_model."): weight for name, weight in found.items()}
    expected = {name.removeprefix("text_model."): weight for name, weight in state_dict.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_full_size_file_has_2513_keys():
    weights = full_size_xl_weights()
    prefixes = ("model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    assert [sum(name.startswith(prefix) for name in weights) for prefix in prefixes] == [1680, 248, 196, 389]
    assert weights["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.bias" in weights
