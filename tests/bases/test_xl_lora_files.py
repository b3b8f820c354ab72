"""LoRAs from elsewhere for XL: the UNet's layers by the numbers of its own code, those of both text encoders apart."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from bases.lora_files import check_lora_fits, fuse_lora, read_lora_file
from models.loading import load_text_encoder, load_unet
from runtime.errors import UserError
from tiny_xl import make_xl_model

RANK, ALPHA = 2, 1.0
TEXT = "text_model_encoder_layers_1_self_attn_out_proj"
# {name in kohya's files: (part, its weight)}: one in each list of XL's own code, and one in each text encoder
LAYERS = {
    "lora_unet_input_blocks_5_1_transformer_blocks_1_attn1_to_q": (
        "unet", "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q"),
    "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k": (
        "unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
    "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_2": (
        "unet", "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2"),
    "lora_unet_input_blocks_3_1_proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
    f"lora_te1_{TEXT}": ("text_encoder", "encoder.layers.1.self_attn.out_proj"),
    f"lora_te2_{TEXT}": ("text_encoder_2", "encoder.layers.1.self_attn.out_proj"),
}  # fmt: skip
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_xl_model(tmp_path_factory.mktemp("models") / "xl")


def load(folder: Path, part: str) -> torch.nn.Module:
    return load_unet(folder) if part == "unet" else load_text_encoder(folder, part=part)


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model.").removesuffix(".weight"): w for name, w in model.state_dict().items()}


def write_lora_file(file: Path, folder: Path, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """{key of LAYERS: what it adds}; in the file the layers have these `names`."""
    torch.manual_seed(0)
    tensors, added = {}, {}
    shapes = {part: {n: w.shape for n, w in plain_weights(load(folder, part)).items()} for part in PARTS}
    for key, name in names.items():
        part, layer = LAYERS[key]
        out, width = shapes[part][layer]
        down, up = torch.randn(RANK, width), torch.randn(out, RANK)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        added[key] = up @ down * (ALPHA / RANK)
    save_file(tensors, file)
    return added


def diffusers_names() -> dict[str, str]:
    return {key: f"{part}.{'text_model.' * (part != 'unet')}{layer}" for key, (part, layer) in LAYERS.items()}


@pytest.mark.parametrize("naming", ["kohya", "kohya, diffusers' numbers", "diffusers"])
def test_each_layer_changes_its_own_weight_and_no_other(folder, tmp_path, naming):
    names = {
        "kohya": {key: key for key in LAYERS},
        "kohya, diffusers' numbers": {
            key: f"lora_unet_{layer.replace('.', '_')}" if part == "unet" else key
            for key, (part, layer) in LAYERS.items()
        },
        "diffusers": diffusers_names(),
    }[naming]
    file = tmp_path / "xl.safetensors"
    added = write_lora_file(file, folder, names)
    check_lora_fits(file, folder, "unet", folder)
    for part in PARTS:
        model = load(folder, part)
        before = {name: weight.clone() for name, weight in plain_weights(model).items()}
        fuse_lora(read_lora_file(file), model, part, 0.5)
        changes = {layer: 0.5 * added[key] for key, (of, layer) in LAYERS.items() if of == part}
        for name, weight in plain_weights(model).items():
            assert (
                torch.allclose(weight, before[name] + changes[name], atol=1e-5)
                if name in changes
                else torch.equal(weight, before[name])
            )


def test_the_weights_are_the_ones_that_diffusers_fuses(folder, tmp_path):
    write_lora_file(tmp_path / "xl.safetensors", folder, {key: key for key in LAYERS})
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path, weight_name="xl.safetensors")
    pipeline.fuse_lora(components=list(PARTS), lora_scale=0.7)
    pipeline.unload_lora_weights()
    lora = read_lora_file(tmp_path / "xl.safetensors")
    for part in PARTS:
        model = load(folder, part)
        fuse_lora(lora, model, part, 0.7)
        expected, found = plain_weights(getattr(pipeline, part)), plain_weights(model)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(weight, expected[name], atol=1e-5) for name, weight in found.items())


def test_layers_of_the_second_text_encoder_do_not_pass_for_the_firsts(folder, tiny_model, tmp_path):
    keys = [f"lora_te{number}_{TEXT}" for number in (1, 2)]
    write_lora_file(tmp_path / "swapped.safetensors", folder, dict(zip(keys, keys[::-1], strict=True)))
    with pytest.raises(UserError, match="0 of 2 layers fit; .*out_proj is 128 x 128, in this model 64 x 64"):
        check_lora_fits(tmp_path / "swapped.safetensors", folder, "unet", folder)
    with pytest.raises(UserError, match="for another base: 0 of 1 layers .*no text_encoder_2"):
        write_lora_file(tmp_path / "two.safetensors", folder, {keys[1]: keys[1]})
        check_lora_fits(tmp_path / "two.safetensors", tiny_model, "unet", tiny_model)
