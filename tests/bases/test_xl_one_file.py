"""One-file checkpoints of XL: a folder is made of them with the same bits, or they are refused with what they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import bases.tokenizer_files
from bases.checking import check_model
from bases.checkpoint_files import CheckpointFile
from bases.one_file import convert_one_file, plan_conversion
from models.loading import load_noise_scheduler
from one_file_models import as_ema, full_size_xl_weights, ldm_weights, write_one_file
from runtime.errors import UserError
from tiny_xl import make_xl_model
from unet_configs import SDXL

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}  # fmt: skip
UNET, ONE, TWO = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.text_model.",
    "conditioner.embedders.1.",
)
PROJECTION = f"{TWO}model.text_projection"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_xl_model(tmp_path_factory.mktemp("models") / "xl")


@pytest.fixture(scope="module")
def xl_weights(folder):
    return ldm_weights(folder, "XL")


@pytest.fixture
def convert_file(folder, xl_weights, tmp_path):
    """`convert_file(changes)` is the folder made of a file of XL's weights with these changes; None removes one."""

    def convert(changes: dict | None = None, tokenizer: Path | None = folder, yaml: str | None = None) -> Path:
        changed = {**xl_weights, **(changes or {})}
        file = write_one_file(tmp_path / "xl.safetensors", {n: w for n, w in changed.items() if w is not None})
        if yaml:
            file.with_suffix(".yaml").write_text(yaml)
        return convert_one_file(file, f"--model {file}", tmp_path / "converted", tokenizer, False, None)

    return convert


def part_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    weights = load_file(folder / part / f"{PARTS[part]}.safetensors")
    return {name.removeprefix("text_model."): weight for name, weight in weights.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def config_of(folder: Path, part: str, name: str = "config.json") -> dict:
    return json.loads((folder / part / name).read_text())


# --- converted ------------------------------------------------------------------------------------------------------


def test_the_folder_has_every_bit_and_generates_the_same_picture(convert_file, folder, capsys):
    converted = convert_file()
    assert "(Stable Diffusion XL, epsilon)" in capsys.readouterr().out
    check_model(converted)
    assert all(same(part_of(converted, part), part_of(folder, part)) for part in PARTS)
    pictures = []
    for model in (folder, converted):
        pipeline = DiffusionPipeline.from_pretrained(model)
        assert type(pipeline) is StableDiffusionXLPipeline and pipeline.config.force_zeros_for_empty_prompt
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        pictures.append(pipeline("jeans", generator=torch.Generator().manual_seed(3), **settings).images.numpy())
    assert np.array_equal(*pictures)


def test_the_two_tokenizers_differ_in_what_they_pad_with(convert_file, folder, monkeypatch):
    monkeypatch.setattr(
        bases.tokenizer_files, "hf_hub_download", lambda repository, name, cache_dir: folder / "tokenizer" / name
    )
    for tokenizer in (folder, folder / "tokenizer", None):  # None: from the hub
        converted = convert_file(tokenizer=tokenizer)
        one, two = (CLIPTokenizer.from_pretrained(converted / name) for name in ("tokenizer", "tokenizer_2"))
        assert (one.pad_token, two.pad_token, two.pad_token_id) == ("<|endoftext|>", "!", 0)
        assert one("denim jeans").input_ids == two("denim jeans").input_ids


def test_what_programs_write_differently_or_beside_the_weights_is_read(convert_file, xl_weights, folder):
    """The projection as transformers has it, CLIP without the wrapper in its names, and what is not used."""
    bare = {name: None for name in xl_weights if name.startswith(ONE)}
    bare |= {name.replace(".text_model.", "."): xl_weights[name] for name in bare}
    other = {PROJECTION: None, f"{PROJECTION}.weight": xl_weights[PROJECTION].T.contiguous()}
    unused = {f"{TWO}model.logit_scale": torch.ones(()), "denoiser.sigmas": torch.ones(9),
              f"{TWO}logit_scale": torch.ones(()), f"{ONE}embeddings.position_ids": torch.arange(77),
              "conditioner.embedders.0.transformer.text_projection.weight": torch.ones(2, 2)}  # fmt: skip
    converted = convert_file(bare | other | unused)
    assert all(same(part_of(converted, part), part_of(folder, part)) for part in PARTS)


def test_of_weights_and_their_average_the_weights_are_taken(convert_file, xl_weights, folder, capsys):
    both = {name: weight + 1 for name, weight in as_ema(xl_weights).items()}
    only = as_ema(xl_weights) | {name: None for name in xl_weights if name.startswith(UNET)}
    for changes, words in ((both, "left out"), (only, "as it has no others")):
        assert same(part_of(convert_file(changes), "unet"), part_of(folder, "unet"))
        assert words in capsys.readouterr().out


def test_two_precisions_in_one_part_become_fp32(convert_file, xl_weights):
    name = f"{TWO}model.ln_final.bias"
    weights = part_of(convert_file({name: xl_weights[name].half()}), "text_encoder_2")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


SGM = "model: {{params: {{scale_factor: 0.13, denoiser_config: {{params: {{scaling_config: {{target: sgm.{}}}}}}}}}}}"


@pytest.mark.parametrize(
    ("changes", "yaml", "expected"),
    [
        ({}, None, ("epsilon", False, "leading")),
        ({"v_pred": torch.zeros(0)}, None, ("v_prediction", False, "leading")),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, None, ("v_prediction", True, "trailing")),
        ({}, SGM.format("VScaling"), ("v_prediction", False, "leading")),
        ({}, SGM.format("EpsScaling"), ("epsilon", False, "leading")),
        ({}, "model: {params: {zsnr: true, parameterization: v}}", ("v_prediction", True, "trailing")),
    ],
)
def test_the_prediction_type_is_in_the_file_or_beside_it(convert_file, changes, yaml, expected):
    converted = convert_file(changes, yaml=yaml)
    config, own = load_noise_scheduler(converted).config, config_of(converted, "scheduler", "scheduler_config.json")
    assert own["_class_name"] == "EulerDiscreteScheduler" and own["timestep_spacing"] == expected[2]
    assert (config.prediction_type, config.rescale_betas_zero_snr) == expected[:2]


def test_a_yaml_of_another_denoiser_is_refused(convert_file):
    with pytest.raises(UserError, match=r"xl\.yaml: .*'EDMScaling'.*EpsScaling, VScaling"):
        convert_file(yaml=SGM.format("EDMScaling"))
    with pytest.raises(UserError, match=r"v_prediction by its key v_pred, epsilon by xl\.yaml"):
        convert_file({"v_pred": torch.zeros(0)}, yaml=SGM.format("EpsScaling"))


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting.*reads 9 channels"),
        ({"conditioner.embedders.0.model.text_projection": torch.zeros(1)}, "the refiner of Stable Diffusion XL"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "Playground"),
        ({"edm_vpred.sigma_max": torch.zeros(())}, "CosXL"),
        ({f"{UNET}joint_blocks.0.x": torch.zeros(1)}, "Stable Diffusion 3"),
        ({f"{UNET}label_emb.0.0.weight": None}, r"missing: model\.diffusion_model\.label_emb\.0\.0\.weight$"),
        ({f"{UNET}label_emb.0.2.bias": None}, r"missing: model\.diffusion_model\.label_emb\.0\.2\.bias$"),
        ({PROJECTION: None}, rf"missing: {PROJECTION}$"),
        ({f"{TWO}model.ln_final.bias": None}, r"missing: conditioner\.embedders\.1\.model\.ln_final\.bias$"),
        ({f"{ONE}final_layer_norm.bias": None}, r"missing: .*text_model\.final_layer_norm\.bias$"),
        ({f"{UNET}input_blocks.5.1.transformer_blocks.1.attn2.to_k.weight": None}, r"missing: .*blocks\.1\.attn2"),
        ({f"{TWO}model.token_embedding.weight": None}, r"no text encoder .*\(conditioner\.embedders\.1\.model\.\*\)"),
        ({f"{ONE}embeddings.token_embedding.weight": None}, r"no text encoder .*\(conditioner\.embedders\.0"),
        ({"first_stage_model.encoder.conv_in.weight": None}, "no VAE"),
        ({f"{TWO}model.extra": torch.zeros(1)}, r"Stable Diffusion XL does not have: .*\.model\.extra$"),
        ({f"{UNET}label_emb.0.0.weight": torch.zeros(128, 289)}, "label_emb reads 289 numbers"),
        ({PROJECTION: torch.zeros(96, 128)}, r"label_emb reads 288 numbers, which are not the 128"),
        ({f"{TWO}model.ln_final.bias": torch.zeros(3)}, r"other sizes.*ln_final\.bias \(3,\)"),
        ({f"{TWO}model.ln_final.bias": torch.zeros(128, dtype=torch.int8)}, "its text_encoder_2 is stored as I8"),
    ],
)  # fmt: skip
def test_what_is_no_whole_xl_is_refused_by_name(convert_file, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=f"--model .*xl.safetensors: .*{complaint}") as error:
        convert_file(changes)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("converted/*"))


# --- full size ------------------------------------------------------------------------------------------------------


def test_of_the_full_size_file_every_weight_has_its_place_and_the_configs_are_those_of_the_hub():
    file = CheckpointFile(Path("xl.safetensors"), *full_size_header(), {}, torch.empty)
    conversion = plan_conversion(file, "--model xl.safetensors")
    unet, one, two = (conversion.configs[part] for part in ("unet", "text_encoder", "text_encoder_2"))
    assert {name: listed(unet[name]) for name in SDXL} == {name: listed(value) for name, value in SDXL.items()}
    assert (one["num_hidden_layers"], one["hidden_act"], one["num_attention_heads"]) == (12, "quick_gelu", 12)
    assert (two["num_hidden_layers"], two["hidden_act"], two["num_attention_heads"]) == (32, "gelu", 20)
    assert two["projection_dim"] == 1280 and two["architectures"] == ["CLIPTextModelWithProjection"]
    vae = conversion.configs["vae"]
    assert vae["sample_size"] == 1024 and vae["scaling_factor"] == 0.13025
    assert 6.9e9 < conversion.size < 7e9  # bytes in fp16: 2.57, 0.82 and 0.08 B parameters


def full_size_header() -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """(shapes, dtypes) of all weights in a file of XL, of models without data."""
    shapes = {name: tuple(weight.shape) for name, weight in full_size_xl_weights().items()}
    return shapes, dict.fromkeys(shapes, "F16")


def listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
