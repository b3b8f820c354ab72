"""LoRAs from elsewhere: every naming is read, the kinds that are not are named, and what does not fit is counted."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from bases.lora_files import PEFT_CONFIG, PEFT_FILE, check_lora_fits, fuse_lora, read_lora_file
from models.loading import load_text_encoder, load_unet
from models.lora import LORA_FILE, LORA_TARGETS, lora_config, write_lora
from runtime.errors import UserError

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0")
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj")
RANK, ALPHA = 2, 6.0
# {who writes it so: (the layer's name, the two matrices' endings)}
KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")
PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")
OLD_ENDS = ("_lora.down.weight", "_lora.up.weight")


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def ldm(layer: str) -> str:
    return layer.replace("down_blocks.1.attentions.0", "input_blocks.3.1")


def of_2023(layer: str) -> str:
    return layer.replace(".to_", ".processor.to_").removesuffix(".0")


NAMINGS = {
    "kohya": (kohya, KOHYA_ENDS),
    "kohya, the original code's numbers": (lambda layer: kohya(ldm(layer)), KOHYA_ENDS),
    "the original code's names": (lambda layer: "diffusion_model." + ldm(layer), KOHYA_ENDS),
    "diffusers": (lambda layer: "unet." + layer, (".lora.down.weight", ".lora.up.weight")),
    "diffusers, peft's matrices": (lambda layer: "unet." + layer, PEFT_ENDS),
    "diffusers of 2023": (lambda layer: "unet." + of_2023(layer), OLD_ENDS),
    "diffusers of 2023 without unet.": (of_2023, OLD_ENDS),
    "bare": (lambda layer: layer, PEFT_ENDS),
    "peft": (lambda layer: "base_model.model." + layer, PEFT_ENDS),
    "peft's state dict": (lambda layer: "base_model.model." + layer, (".lora_A.me.weight", ".lora_B.me.weight")),
}
TEXT_NAMINGS = {
    "kohya": (lambda layer: "lora_te_text_model_" + layer.replace(".", "_"), KOHYA_ENDS),
    "kohya, XL's": (lambda layer: "lora_te1_text_model_" + layer.replace(".", "_"), KOHYA_ENDS),
    "diffusers": (lambda layer: "text_encoder.text_model." + layer, PEFT_ENDS),
    "diffusers of 2023": (
        lambda layer: "text_encoder.text_model." + layer,
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "diffusers of early 2023": (
        lambda layer: "text_encoder.text_model." + layer.replace("q_proj", "to_q").replace("out_proj", "to_out"),
        OLD_ENDS,
    ),
    "peft": (lambda layer: "base_model.model.text_model." + layer, PEFT_ENDS),
}


def write_named(folder: Path, naming: tuple, layers: tuple[str, ...]) -> tuple[Path, dict[str, torch.Tensor]]:
    """(a LoRA of the two `layers` in one naming, {layer: what it adds to the weight})"""
    name_of, (down_end, up_end) = naming
    torch.manual_seed(0)
    tensors, added = {}, {}
    for layer in layers:
        down, up, name = torch.randn(RANK, 16), torch.randn(16, RANK), name_of(layer)
        tensors |= {name + down_end: down, name + up_end: up}
        added[layer] = up @ down * (ALPHA / RANK)
        if not name.startswith("base_model."):
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    (folder / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 64, "lora_alpha": ALPHA}))
    save_file(tensors, folder / PEFT_FILE)
    return folder / PEFT_FILE, added


def fused(model: torch.nn.Module, file: Path, part: str = "unet", scale: float = 1.0) -> dict[str, torch.Tensor]:
    fuse_lora(read_lora_file(file), model, part, scale)
    return {name.removesuffix(".weight"): weight for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_of_the_unet_is_read_in_every_naming(tiny_model, tmp_path, naming):
    file, added = write_named(tmp_path, NAMINGS[naming], LAYERS)
    check_lora_fits(file, tiny_model, "unet", tiny_model)
    base = {name.removesuffix(".weight"): weight for name, weight in load_unet(tiny_model).state_dict().items()}
    found = fused(load_unet(tiny_model), file, scale=0.5)
    for layer in LAYERS:
        assert torch.allclose(found[layer], base[layer] + 0.5 * added[layer], atol=1e-6)
    assert all(torch.equal(found[name], base[name]) for name in base.keys() - {*LAYERS})


@pytest.mark.parametrize("naming", TEXT_NAMINGS)
def test_a_lora_of_the_text_encoder_is_read_in_every_naming(tiny_model, tmp_path, naming):
    file, added = write_named(tmp_path, TEXT_NAMINGS[naming], TEXT_LAYERS)
    check_lora_fits(file, tiny_model, "unet", tiny_model)
    base, found = (
        load_text_encoder(tiny_model).state_dict(),
        fused(load_text_encoder(tiny_model), file, "text_encoder"),
    )
    for name, weight in base.items():
        layer = name.removeprefix("text_model.").removesuffix(".weight")
        assert torch.allclose(found[name.removesuffix(".weight")], weight + added.get(layer, 0), atol=1e-6)


def test_the_weights_are_the_ones_that_diffusers_fuses(tiny_model, tmp_path):
    unet = load_unet(tiny_model)
    unet.add_adapter(lora_config(4, 8.0))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    write_lora(unet, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    expected, found = pipeline.unet.state_dict(), load_unet(tiny_model)
    fuse_lora(read_lora_file(tmp_path / LORA_FILE), found, "unet", 0.7)
    assert all(torch.equal(weight, expected[name]) for name, weight in found.state_dict().items())


CONVOLUTIONS = ["conv1", "conv_shortcut", "proj_in"]


@pytest.mark.parametrize("names", ["peft", "kohya"])
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=RANK, alpha=ALPHA, target_modules=LORA_TARGETS + CONVOLUTIONS),
        LoHaConfig(r=RANK, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
        LoKrConfig(r=1, alpha=ALPHA, target_modules=LORA_TARGETS + CONVOLUTIONS),
        LoKrConfig(r=1, alpha=ALPHA, target_modules=CONVOLUTIONS, use_effective_conv2d=True, decompose_both=True),
    ],
    ids=["loha", "loha, convolutions", "lokr", "lokr, convolutions"],
)
def test_loha_and_lokr_change_the_weights_as_in_peft(tiny_model, tmp_path, config, names):
    unet = inject_adapter_in_model(config, load_unet(tiny_model))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "hada_" in name or "lokr_" in name:
            torch.nn.init.normal_(parameter)
    state = get_peft_model_state_dict(unet)
    expected = merged(unet)
    if names == "peft":
        state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        (tmp_path / PEFT_CONFIG).write_text(json.dumps({"peft_type": config.peft_type, "r": config.r, "alpha": ALPHA}))
    else:
        state = {f"{kohya(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": t for name, t in state.items()}
        state |= {f"{name.partition('.')[0]}.alpha": torch.tensor(ALPHA) for name in state}
    save_file(state, tmp_path / PEFT_FILE)
    check_lora_fits(tmp_path / PEFT_FILE, tiny_model, "unet", tiny_model)
    base, found = load_unet(tiny_model).state_dict(), fused(load_unet(tiny_model), tmp_path / PEFT_FILE)
    changed = [name for name in base if not torch.equal(base[name], expected[name])]
    assert len(changed) == len({name.rpartition(".")[0] for name in state})
    assert all(torch.allclose(found[n.removesuffix(".weight")], expected[n], rtol=1e-4, atol=1e-4) for n in base)


def merged(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights with peft's own adapters fused."""
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items()}


def test_the_alpha_of_a_lokr_of_two_whole_matrices_does_not_count(tiny_model, tmp_path):
    """As in LyCORIS, which divides it by a rank that such a layer does not have."""
    torch.manual_seed(0)
    one, two, name = torch.randn(4, 4), torch.randn(4, 4), kohya(LAYERS[0])
    save_file({f"{name}.lokr_w1": one, f"{name}.lokr_w2": two, f"{name}.alpha": torch.tensor(1e9)}, tmp_path / "a")
    base = load_unet(tiny_model).state_dict()[f"{LAYERS[0]}.weight"]
    found = fused(load_unet(tiny_model), tmp_path / "a")[LAYERS[0]]
    assert torch.allclose(found, base + torch.kron(one, two), atol=1e-5)


def test_a_layer_may_have_an_alpha_of_its_own(tiny_model, tmp_path):
    """And rsLoRA divides by the square root of the rank."""
    file, added = write_named(tmp_path, NAMINGS["peft"], LAYERS)
    config = {"peft_type": "LORA", "lora_alpha": ALPHA, "alpha_pattern": {"attn2.to_out.0": 1}, "use_rslora": True}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    base, found = load_unet(tiny_model).state_dict(), fused(load_unet(tiny_model), file)
    for layer, factor in zip(LAYERS, (1, 1 / ALPHA), strict=True):
        expected = base[f"{layer}.weight"] + factor * RANK**0.5 * added[layer]
        assert torch.allclose(found[layer], expected, atol=1e-5)


def test_a_convolution_in_three_parts_is_read(tiny_model, tmp_path):
    """LyCORIS's LoCon with a Tucker decomposition: down, mid, up are three convolutions one after the other."""
    torch.manual_seed(0)
    name = "down_blocks.0.resnets.0.conv1"
    base, shape = load_unet(tiny_model).state_dict()[f"{name}.weight"], (8, 8, 3, 3)
    down, mid, up = torch.randn(RANK, 8, 1, 1), torch.randn(RANK, RANK, 3, 3), torch.randn(8, RANK, 1, 1)
    tensors = {f"{kohya(name)}.lora_{role}.weight": t for role, t in {"down": down, "mid": mid, "up": up}.items()}
    save_file(tensors, tmp_path / "locon.safetensors")
    check_lora_fits(tmp_path / "locon.safetensors", tiny_model, "unet", tiny_model)
    added = fused(load_unet(tiny_model), tmp_path / "locon.safetensors")[name] - base
    pixels = torch.randn(1, 8, 6, 6)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(pixels, down), mid, padding=1), up)
    assert base.shape == shape and torch.allclose(conv(pixels, added, padding=1), expected, atol=1e-4)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("naming", "tensor", "kind"),
    [
        ("kohya", ".dora_scale", "DoRA"),
        ("diffusers", ".lora_magnitude_vector", "DoRA"),
        ("peft", ".lora_magnitude_vector", "DoRA"),
        ("peft", ".oft_R.weight", "OFT"),
        ("kohya", ".diff", "full-difference"),
        ("kohya", ".a1.weight", "GLoRA"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_kind(tmp_path, naming, tensor, kind):
    name_of, ends = NAMINGS[naming]
    tensors = {name_of(LAYERS[0]) + end: torch.zeros(2, 2) for end in (*ends, tensor)}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors: an? {kind} adapter"):
        read_lora_file(tmp_path / "other.safetensors")


def test_pefts_file_needs_its_config_and_a_kind_that_is_read(tiny_model, tmp_path):
    file, _ = write_named(tmp_path, NAMINGS["peft"], LAYERS)
    (tmp_path / PEFT_CONFIG).write_text('{"peft_type": "VERA"}')
    with pytest.raises(UserError, match=f"{PEFT_CONFIG}: .*VERA"):
        read_lora_file(file)
    (tmp_path / PEFT_CONFIG).unlink()
    with pytest.raises(UserError, match=f"{PEFT_FILE}: .*{PEFT_CONFIG}"):
        read_lora_file(file)


@pytest.mark.parametrize("naming", ["kohya", "diffusers of 2023", "peft"])
@pytest.mark.parametrize(
    ("layers", "width", "complaint"),
    [
        ((LAYERS[0], LAYERS[1].replace("blocks.1", "blocks.3")), 16, "1 of 2 layers .*no .*down_blocks.3"),
        (LAYERS, 24, "0 of 2 layers .*attn1.*to_q is 16 x 24, in this model 16 x 16"),
    ],
)
def test_a_lora_that_fits_in_part_or_in_no_width_is_refused_with_the_counts(
    tiny_model, tmp_path, naming, layers, width, complaint
):
    name_of, (down_end, up_end) = NAMINGS[naming]
    tensors = {name_of(layer) + down_end: torch.zeros(RANK, width) for layer in layers}
    tensors |= {name_of(layer) + up_end: torch.zeros(16, RANK) for layer in layers}
    save_file(tensors, tmp_path / PEFT_FILE)
    (tmp_path / PEFT_CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=f"{PEFT_FILE}: for another base: {complaint}"):
        check_lora_fits(tmp_path / PEFT_FILE, tiny_model, "unet", tiny_model)


@pytest.mark.parametrize("naming", TEXT_NAMINGS)
def test_layers_of_another_text_encoder_are_counted_too(tiny_model, tmp_path, naming):
    layers = (TEXT_LAYERS[0], TEXT_LAYERS[1].replace("layers.0", "layers.11"))
    file, _ = write_named(tmp_path, TEXT_NAMINGS[naming], layers)
    with pytest.raises(UserError, match=f"{PEFT_FILE}: for another base: 1 of 2 layers .*layers.11"):
        check_lora_fits(file, tiny_model, "unet", tiny_model)


@pytest.mark.parametrize(
    ("alpha", "metadata"),
    [
        (torch.ones(3), {}),
        (torch.tensor(float("nan")), {}),
        (None, {"lora_adapter_metadata": "[1]"}),
        (None, {"lora_adapter_metadata": '{"unet.lora_alpha": "8"}'}),
        (None, {"lora_adapter_metadata": '{"alpha_pattern": {"(": 1}}'}),
    ],
)
def test_a_strength_that_is_none_is_refused_before_anything_is_generated(tiny_model, tmp_path, alpha, metadata):
    layer = kohya(LAYERS[0])
    tensors = {layer + end: torch.zeros(16 if end == KOHYA_ENDS[1] else RANK, RANK) for end in KOHYA_ENDS}
    tensors[layer + KOHYA_ENDS[0]] = torch.zeros(RANK, 16)
    save_file(tensors | ({} if alpha is None else {f"{layer}.alpha": alpha}), tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match="a.safetensors: (damaged: alpha of|lora_adapter_metadata)"):
        check_lora_fits(tmp_path / "a.safetensors", tiny_model, "unet", tiny_model)


def test_values_that_are_not_finite_are_the_files_fault(tiny_model, tmp_path):
    layer = kohya(LAYERS[0])
    tensors = {
        layer + KOHYA_ENDS[0]: torch.full((RANK, 16), float("nan")),
        layer + KOHYA_ENDS[1]: torch.ones(16, RANK),
    }
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="nan.safetensors: damaged: .*to_q"):
        fused(load_unet(tiny_model), tmp_path / "nan.safetensors")


def test_a_note_of_git_lfs_is_no_lora(tmp_path):
    (tmp_path / "note.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="note.safetensors.*Git LFS"):
        read_lora_file(tmp_path / "note.safetensors")


def test_a_damaged_file_is_refused(tmp_path):
    save_file({f"{kohya(LAYERS[0])}.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="half.safetensors: damaged: .*to_q"):
        read_lora_file(tmp_path / "half.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="empty.safetensors"):
        read_lora_file(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({".alpha": torch.ones(2)}, r"alpha of .*to_q .*\(2,\)"),
        ({".alpha": torch.tensor(torch.nan)}, "alpha of .*to_q is nan"),
        ({".lora_down.weight": torch.ones(16)}, r"down of .*to_q .*\(16,\)"),
        ({".lora_up.weight": torch.tensor(1.0)}, r"up of .*to_q .*\(\)"),
        ({".lora_mid.weight": torch.ones(2, 2)}, "matrices of .*to_q do not fit"),
        ({".lora_up.weight": torch.full((16, RANK), torch.nan)}, "to_q adds is not finite"),
        ({".lora_up.weight": torch.full((16, RANK), 3e38)}, "to_q adds is not finite"),
    ],
)
def test_a_tensor_that_nothing_can_be_added_with_is_named(tiny_model, tmp_path, change, fault):
    name, file = kohya(LAYERS[0]), tmp_path / "bad.safetensors"
    whole = {".lora_down.weight": torch.ones(RANK, 16), ".lora_up.weight": torch.ones(16, RANK)}
    save_file({name + role: tensor for role, tensor in {**whole, **change}.items()}, file)
    with pytest.raises(UserError, match=f"bad.safetensors: .*{fault}"):
        check_lora_fits(file, tiny_model, "unet", tiny_model)
        fused(load_unet(tiny_model), file)


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"r": 0},
        {"alpha_pattern": ["attn1"]},
        {"alpha_pattern": {"attn1": "8"}},
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": {"(?i)q": 8}},
        {"use_rslora": "yes"},
    ],
)
@pytest.mark.parametrize("naming", ["peft", "diffusers"])
def test_a_setting_of_another_type_is_named_with_its_file(tmp_path, naming, setting):
    file, _ = write_named(tmp_path, NAMINGS[naming], LAYERS)
    [(key, value)] = setting.items()
    if naming == "peft":
        (tmp_path / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", **setting}))
    else:
        save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value})})
    culprit = PEFT_CONFIG if naming == "peft" else PEFT_FILE
    with pytest.raises(UserError, match=f"{culprit}: .*{key} is"):
        read_lora_file(file, "meta")


@pytest.mark.parametrize("content", ["[]", "{", '"8"'])
@pytest.mark.parametrize("naming", ["peft", "diffusers"])
def test_settings_that_are_no_json_object_are_refused(tmp_path, naming, content):
    file, _ = write_named(tmp_path, NAMINGS[naming], LAYERS)
    (tmp_path / PEFT_CONFIG).write_text(content)
    save_file(load_file(file), file, {"lora_adapter_metadata": content})
    with pytest.raises(UserError, match=f"{PEFT_CONFIG if naming == 'peft' else 'lora_adapter_metadata'}: not"):
        read_lora_file(file, "meta")
