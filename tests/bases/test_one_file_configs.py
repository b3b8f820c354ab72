"""What a one-file checkpoint is: its prediction type, its size, and what it is where it cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from bases.checkpoint_files import CheckpointFile
from bases.ldm_keys import unet_to_ldm, vae_to_ldm
from bases.one_file import plan_conversion
from bases.text_encoder_keys import text_encoder_to_ldm
from models.loading import load_noise_scheduler
from one_file_models import FAMILIES, ldm_weights, write_one_file
from runtime.errors import UserError
from unet_configs import SD15, SD21

VELOCITY = {"modelspec.prediction_type": "v"}
V_PRED = {"v_pred": torch.zeros(0)}
YAML = "model: {{params: {{parameterization: {}, image_size: 48, scale_factor: 0.5, linear_end: 0.02}}}}"


@pytest.mark.parametrize(
    ("version", "changes", "yaml", "metadata", "expected"),
    [
        (1, {}, None, None, "epsilon"),
        (1, V_PRED, None, None, "v_prediction"),
        (1, {}, YAML.format("v"), None, "v_prediction"),
        (1, {}, None, VELOCITY, "v_prediction"),
        (1, V_PRED, YAML.format("v"), VELOCITY, "v_prediction"),
        (1, {}, YAML.format("x0"), None, "sample"),
        (2, V_PRED, None, {}, "v_prediction"),
        (2, {}, YAML.format("eps"), {}, "epsilon"),
        (2, {}, "model: {params: {use_ema: false}}", {}, "epsilon"),
        (2, {}, None, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        (2, {}, None, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        (2, {}, None, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_the_prediction_type_is_in_the_file_or_beside_it(
    convert, file_of, tmp_path, version, changes, yaml, metadata, expected
):
    file = file_of(version, changes, metadata)
    if yaml:
        file.with_suffix(".yaml").write_text(yaml)
    folder = convert(file)
    assert load_noise_scheduler(folder).config.prediction_type == expected
    if yaml and "48" in yaml:
        scheduler = load_noise_scheduler(folder).config
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        assert (unet["sample_size"], vae["scaling_factor"], scheduler.beta_end) == (48, 0.5, 0.02)


@pytest.mark.parametrize("name", ["rescale_betas_zero_snr", "zero_terminal_snr", "ztsnr", "zsnr"])
def test_zero_terminal_snr_may_be_told_by_the_yaml(convert, file_of, tmp_path, name):
    found = []
    for value in ("true", "false"):
        (tmp_path / "m.yaml").write_text(f"model: {{params: {{parameterization: v, {name}: {value}}}}}")
        config = load_noise_scheduler(convert(file_of(1))).config
        found.append((config.prediction_type, config.rescale_betas_zero_snr))
    assert found == [("v_prediction", True), ("v_prediction", False)]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ("parameterization: flow", "parameterization is 'flow'.*eps, v, x0"),
        ("parameterization: [v]", "parameterization is"),
        ("zero_terminal_snr: maybe", "zero_terminal_snr is 'maybe'"),
        ("image_size: large", "image_size is 'large'"),
        ("timesteps: 0", "timesteps is 0"),
        ("linear_end: .nan", "linear_end is nan"),
        ("scale_factor: true", "scale_factor is True"),
    ],
)
def test_what_a_yaml_says_and_is_not_known_is_refused(convert, file_of, tmp_path, params, named):
    (tmp_path / "m.yaml").write_text(f"model: {{params: {{{params}}}}}")
    with pytest.raises(UserError, match=rf"m\.yaml: {named}"):
        convert(file_of(1))


def test_an_unknown_prediction_type_in_the_metadata_is_refused(convert, file_of):
    with pytest.raises(UserError, match=r"m\.safetensors: modelspec\.prediction_type.*'flow'.*epsilon, v, sample"):
        convert(file_of(1, metadata={"modelspec.prediction_type": "flow"}))


def test_a_2_x_model_has_the_size_that_goes_with_what_it_predicts(convert, file_of):
    velocity = convert(file_of(2))
    noise = convert(file_of(2, metadata={"modelspec.prediction_type": "epsilon"}))
    file = file_of(2, name="with_yaml")  # as the 2.x models for 768 px came, with a size that is not theirs
    file.with_suffix(".yaml").write_text("model: {params: {parameterization: v, image_size: 64}}")
    folders = (velocity, noise, convert(file))
    sizes = [json.loads((f / "unet" / "config.json").read_text())["sample_size"] for f in folders]
    assert sizes == [96, 64, 96]


def test_a_2_x_file_that_does_not_say_what_it_predicts_is_refused(convert, file_of):
    with pytest.raises(UserError, match=r"noise or velocity.*m\.yaml"):
        convert(file_of(2, metadata={}))


@pytest.mark.parametrize("yaml", ["just text", "model: [", "model: {params: 3}", "other: 1"])
def test_a_yaml_that_describes_no_model_is_named(convert, file_of, tmp_path, yaml):
    (tmp_path / "m.yaml").write_text(yaml)
    with pytest.raises(UserError, match=r"m\.yaml: not the \.yaml") as error:
        convert(file_of(1))
    assert "\n" not in str(error.value)


def test_statements_that_contradict_each_other_are_refused(convert, file_of, tmp_path):
    (tmp_path / "m.yaml").write_text(YAML.format("eps"))
    with pytest.raises(UserError, match=r"v_prediction by its key v_pred, epsilon by m\.yaml"):
        convert(file_of(1, V_PRED))


def test_a_file_of_something_else_is_refused_with_what_it_is(convert, tmp_path):
    found = {
        "lora_unet_x.lora_down.weight": "--lora",
        "x": "but x",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux",
        "double_blocks.0.img_attn.qkv.weight": "Flux",
        "control_model.input_blocks.0.0.weight": "ControlNet",
        "down_blocks.0.resnets.0.conv1.weight": "a folder in diffusers' format",
    }
    for number, (key, complaint) in enumerate(found.items()):
        file = write_one_file(tmp_path / f"{number}.safetensors", {key: torch.zeros(1)})
        with pytest.raises(UserError, match=f"{number}.safetensors: .*{complaint}"):
            convert(file)


def test_layers_that_are_not_stable_diffusions_are_refused(convert, tiny_model, tmp_path):
    file = write_one_file(tmp_path / "tiny.safetensors", ldm_weights(tiny_model, 1))
    with pytest.raises(UserError, match=r"8, 16, 4, 8 channels.*a folder in diffusers' format"):
        convert(file)


# --- full size ------------------------------------------------------------------------------------------------------

SIZES = {
    1: (SD15, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}),
    2: (SD21, {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}),
}


def full_size_shapes(version: int) -> dict[str, tuple[int, ...]]:
    """Of all weights in a file of Stable Diffusion 1.5 or 2.1, of models without data."""
    unet, text = SIZES[version]
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(CLIPTextConfig(**text, intermediate_size=4 * text["hidden_size"]))
        weights = unet_to_ldm(UNet2DConditionModel(**unet).state_dict()) | vae_to_ldm(vae.state_dict())
        weights |= text_encoder_to_ldm(text_encoder.state_dict(), *FAMILIES[version].text_encoders)
    return {name: tuple(weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize(("version", "metadata"), [(1, {}), (2, VELOCITY)])
def test_of_full_size_files_every_weight_has_its_place_and_the_configs_are_those_of_the_hub(version, metadata):
    shapes = full_size_shapes(version)
    file = CheckpointFile(Path("sd.safetensors"), shapes, dict.fromkeys(shapes, "F16"), metadata, torch.empty)
    conversion = plan_conversion(file, "--model sd.safetensors")
    unet, text = SIZES[version]
    for expected, config in ((unet, conversion.configs["unet"]), (text, conversion.configs["text_encoder"])):
        assert {name: as_list(config[name]) for name in expected} == {n: as_list(v) for n, v in expected.items()}
    assert conversion.configs["vae"]["block_out_channels"] == [128, 256, 512, 512]
    assert conversion.configs["vae"]["sample_size"] == (768 if version == 2 else 512)
    assert conversion.configs["unet"]["block_out_channels"] == [320, 640, 1280, 1280]


def as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
