"""LDM keys: those of Stable Diffusion's own code, and diffusers' converter turns each one back into its own key."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from bases.families import SD1, SD2
from bases.ldm_keys import unet_key_map, unet_to_ldm, vae_to_ldm
from bases.text_encoder_keys import text_encoder_to_ldm
from runtime.errors import UserError

[CLIP], [OPEN_CLIP] = SD1.text_encoders, SD2.text_encoders
CLIP_PREFIX, OPEN_CLIP_PREFIX = CLIP.prefixes[0], OPEN_CLIP.prefixes[0]


def unet(channels, attention_levels, layers: int, **settings) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if i in attention_levels else "DownBlock2D" for i in range(len(channels))]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=channels, down_block_types=down, up_block_types=up, layers_per_block=layers,
        norm_num_groups=4, cross_attention_dim=8, **{"attention_head_dim": 2, **settings},
    )  # fmt: skip


UNETS = {
    "SD 1.5's blocks": lambda: unet((4, 8, 16, 16), (0, 1, 2), 2),
    "SD 2's blocks": lambda: unet(
        (4, 8, 16, 16), (0, 1, 2), 2, use_linear_projection=True, attention_head_dim=[1, 2, 4, 4]
    ),
    "the starter's blocks": lambda: unet((12, 20, 32, 32), (2, 3), 1),
    "two levels of three layers": lambda: unet((4, 8), (0,), 3),
    "one level": lambda: unet((8,), (0,), 1),
}


def original_unet_layers(channels, attention_levels, layers: int) -> dict[str, str]:
    """{place in the lists: kind of layer}, counted as Stable Diffusion's own code builds its UNet, level by level."""
    layer_kinds, width = {"input_blocks.0.0": "conv"}, [channels[0]]
    n = 1
    for level in range(len(channels)):
        for _ in range(layers):
            layer_kinds[f"input_blocks.{n}.0"] = "resnet" + "+" * (width[-1] != channels[level])
            if level in attention_levels:
                layer_kinds[f"input_blocks.{n}.1"] = "attention"
            width.append(channels[level])
            n += 1
        if level < len(channels) - 1:
            layer_kinds[f"input_blocks.{n}.0"] = "down"
            width.append(channels[level])
            n += 1
    layer_kinds |= {"middle_block.0": "resnet", "middle_block.1": "attention", "middle_block.2": "resnet"}
    n = 0
    for level in reversed(range(len(channels))):
        for i in range(layers + 1):
            width.pop()
            layer_kinds[f"output_blocks.{n}.0"] = "resnet+"  # concatenated with the skip connection, so never as wide
            if level in attention_levels:
                layer_kinds[f"output_blocks.{n}.1"] = "attention"
            if level and i == layers:
                layer_kinds[f"output_blocks.{n}.{1 + (level in attention_levels)}"] = "up"
            n += 1
    return layer_kinds


def ldm_keys_of(layer_kinds: dict[str, str]) -> set[str]:
    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    block = "transformer_blocks.0"
    attention = ["norm", "proj_in", "proj_out", *(f"{block}.norm{i}" for i in (1, 2, 3))]
    attention += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2", *(f"{block}.attn{i}.to_out.0" for i in (1, 2))]
    layers = {
        "conv": [""], "resnet": resnet, "resnet+": [*resnet, "skip_connection"], "down": ["op"], "up": ["conv"],
        "attention": attention,
    }  # fmt: skip
    found = {f"{place}.{layer}".rstrip(".") for place, kind in layer_kinds.items() for layer in layers[kind]}
    found |= {"time_embed.0", "time_embed.2", "out.0", "out.2"}
    plain = {f"{place}.{block}.attn{i}.to_{which}.weight" for place, kind in layer_kinds.items() if kind == "attention"
             for i in (1, 2) for which in "qkv"}  # fmt: skip
    return plain | {f"{name}.{kind}" for name in found for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("blocks", "channels", "attention_levels", "layers"),
    [
        ("SD 1.5's blocks", (4, 8, 16, 16), (0, 1, 2), 2),
        ("SD 2's blocks", (4, 8, 16, 16), (0, 1, 2), 2),
        ("the starter's blocks", (12, 20, 32, 32), (2, 3), 1),
        ("two levels of three layers", (4, 8), (0,), 3),
        ("one level", (8,), (0,), 1),
    ],
)
def test_unet_keys_are_those_of_the_original_code(blocks, channels, attention_levels, layers):
    with torch.device("meta"):
        names = list(UNETS[blocks]().state_dict())
    expected = ldm_keys_of(original_unet_layers(channels, attention_levels, layers))
    assert set(unet_key_map(names).values()) == expected
    assert len(expected) == len(names)
    if blocks == "SD 1.5's blocks":
        assert len(names) == 686
        assert {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight", "input_blocks.3.0.op.bias",
                "output_blocks.11.0.skip_connection.weight"} <= expected  # fmt: skip


@pytest.mark.parametrize("blocks", UNETS)
def test_diffusers_turns_the_unet_back_into_its_own_keys(blocks):
    model = UNETS[blocks]()
    state_dict = model.state_dict()
    found = convert_ldm_unet_checkpoint(unet_to_ldm(state_dict), model.config)
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize("attention", [True, False])
def test_diffusers_turns_the_vae_back_into_its_own_keys(attention):
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        block_out_channels=(4, 8, 16, 16), norm_num_groups=2, latent_channels=4, mid_block_add_attention=attention,
    )  # fmt: skip
    state_dict, written = model.state_dict(), vae_to_ldm(model.state_dict())
    if attention:
        assert written["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert "first_stage_model.decoder.up.3.block.0.norm1.weight" in written
    assert written["first_stage_model.decoder.up.0.block.2.conv2.weight"].shape[0] == 4  # 0 is next to the pixels
    found = convert_ldm_vae_checkpoint(written, model.config)
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], state_dict[name]) for name in state_dict)


def text_encoder(layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=10,
            hidden_act="gelu",
        )  # fmt: skip
    )


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_clips_keys_are_the_same_from_either_version_of_transformers(prefix):
    state_dict = {prefix + name: weight for name, weight in text_encoder(2).state_dict().items()}
    written = text_encoder_to_ldm({**state_dict, f"{prefix}embeddings.position_ids": torch.arange(10)}, CLIP)
    assert {name.removeprefix(CLIP_PREFIX) for name in written} == {name.removeprefix(prefix) for name in state_dict}
    assert CLIP_PREFIX + "encoder.layers.1.self_attn.q_proj.weight" in written
    open_clip = text_encoder_to_ldm(state_dict, OPEN_CLIP)
    assert OPEN_CLIP_PREFIX + "transformer.resblocks.1.attn.in_proj_weight" in open_clip


@pytest.mark.parametrize("layers", [2, 23])
def test_diffusers_turns_open_clip_back_into_its_own_keys(layers):
    model = text_encoder(layers)
    state_dict, written = model.state_dict(), text_encoder_to_ldm(model.state_dict(), OPEN_CLIP)
    assert written[OPEN_CLIP_PREFIX + "transformer.resblocks.0.attn.in_proj_weight"].shape == (24, 8)
    assert written[OPEN_CLIP_PREFIX + "positional_embedding"].shape == (10, 8)
    found = {
        name.removeprefix("text_model."): weight
        for name, weight in convert_open_clip_checkpoint(model, written).items()
    }
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], state_dict[name]) for name in state_dict)


def test_queries_keys_and_values_are_joined_in_this_order():
    state_dict = text_encoder(1).state_dict()
    joined = text_encoder_to_ldm(state_dict, OPEN_CLIP)[OPEN_CLIP_PREFIX + "transformer.resblocks.0.attn.in_proj_bias"]
    assert torch.equal(joined[8:16], state_dict["encoder.layers.0.self_attn.k_proj.bias"])


def test_the_last_layer_that_stable_diffusion_2_never_uses_is_written_for_programs_that_build_it():
    numbers = [
        {
            int(name.split("resblocks.")[1].split(".")[0])
            for name in text_encoder_to_ldm(model, OPEN_CLIP)
            if "resblocks" in name
        }
        for model in (text_encoder(23).state_dict(), text_encoder(2).state_dict())
    ]
    assert numbers == [set(range(24)), set(range(2))]


def test_a_weight_without_an_ldm_key_is_named():
    with pytest.raises(UserError, match="class_embedding.linear_1.weight"):
        unet_key_map(["conv_in.weight", "class_embedding.linear_1.weight"])
    with pytest.raises(UserError, match="its VAE has encoder.extra.weight"):
        vae_to_ldm({"encoder.extra.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="its text encoder has visual.weight"):
        text_encoder_to_ldm({"visual.weight": torch.zeros(1)}, OPEN_CLIP)
