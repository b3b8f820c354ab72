"""export_checkpoint.py and XL: whole models and LoRAs, as plain diffusers and other programs read them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bases.one_file import convert_one_file
from export_checkpoint import parse_args
from exporting.export import export_checkpoint
from exporting.file_metadata import read_checkpoint_format
from exporting.lora_file import export_lora, ldm_names, to_kohya
from generation.weights import find_weights, load_generation_text_encoder, load_generation_unet
from models.loading import load_text_encoder, load_unet
from models.lora import LORA_TARGETS, LoraLayer, lora_config, write_lora
from one_file_models import ldm_weights
from runtime.errors import WorkError
from tiny_xl import make_xl_model
from unet_configs import SDXL

UNSEEN = 3 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_xl_model(tmp_path_factory.mktemp("models") / "xl", "v_prediction")


@pytest.fixture
def exported(tmp_path, capsys):
    def run(model: Path, *flags: object) -> Path:
        words = ["--model", model, "--to", tmp_path / "jeans.safetensors", "--overwrite", *flags]
        args = parse_args(list(map(str, words)))
        (export_lora if args.lora_only else export_checkpoint)(args)
        run.output = capsys.readouterr().out
        return args.to

    return run


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def generated(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(3)}
    return pipeline("denim jeans", height=32, width=32, output_type="np", **settings).images[0]


# --- whole models ---------------------------------------------------------------------------------------------------


def test_plain_diffusers_generates_the_same_picture_with_the_file(exported, folder):
    path = exported(folder, "--dtype", "fp32")
    assert "607 weights read back are equal" in exported.output and "StableDiffusionXLPipeline" in exported.output
    assert metadata(path)["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata(path)["modelspec.prediction_type"] == "v"
    assert not path.with_suffix(".yaml").exists()
    read = StableDiffusionXLPipeline.from_single_file(str(path), config=str(folder), dtype=torch.float32)
    # Equal weights at other places in memory: some processors then round the last bit differently.
    assert np.allclose(generated(read), generated(StableDiffusionXLPipeline.from_pretrained(folder)), atol=1e-5)


def test_folder_to_file_to_folder_to_file_changes_no_bit(exported, folder, tmp_path):
    first = load_file(exported(folder, "--no_verify"))
    written = ldm_weights(folder, "XL", torch.float16)
    assert first.keys() == {*written, "v_pred"} and first.pop("v_pred").numel() == 0
    assert all(torch.equal(first[name], written[name]) for name in written)
    file = tmp_path / "jeans.safetensors"
    converted = convert_one_file(file, f"--model {file}", tmp_path / "converted", folder, False, None)
    second = load_file(exported(converted, "--no_verify"))
    assert second.keys() == {*first, "v_pred"} and all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize(("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", True)])
def test_what_is_predicted_is_in_the_files_keys(exported, tmp_path, folder, prediction, zero_snr):
    model = make_xl_model(tmp_path / "model", prediction)
    scheduler = model / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text()) | {"rescale_betas_zero_snr": zero_snr}
    scheduler.write_text(json.dumps(config))
    found = load_file(exported(model, "--no_verify")).keys() & {"v_pred", "ztsnr"}
    assert found == ({"v_pred", "ztsnr"} if zero_snr else set())


def test_a_file_that_does_not_read_back_as_it_was_is_not_kept(exported, folder, tmp_path, monkeypatch):
    """A projection that is not transposed."""
    monkeypatch.setattr("bases.text_encoder_keys.is_transposed", lambda name: False)
    with pytest.raises(WorkError, match="not kept: .*"):
        exported(folder)
    assert not list(tmp_path.glob("*jeans*"))


def test_only_a_model_of_xls_own_sizes_has_standard_sizes(folder):
    model = read_checkpoint_format(folder, {})
    assert not model.has_standard_sizes
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in SDXL.items()}
    model.configs["unet"] |= {**sizes, "layers_per_block": 2}
    model.configs["vae"] |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    assert model.has_standard_sizes


# --- LoRAs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """As training a LoRA of rank 4 and alpha 8 leaves it."""
    unet = load_unet(folder)
    unet.add_adapter(lora_config(4, 8.0))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    write_lora(unet, tmp_path / "run")
    absent = dict.fromkeys(["revision", "variant", "cache_dir", "allow_pickle", "non_ema_revision"])
    facts = {"finished": True, "base_model": str(folder), "trained": "LoRA", "arguments": {**absent, "trigger": "sks"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    return tmp_path / "run"


def test_plain_diffusers_generates_the_runs_own_picture_with_the_loras_file(exported, run, folder):
    file = exported(run, "--lora_only", "--dtype", "fp32")
    assert "diffusers reads back all" in exported.output
    found = metadata(file)
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (found["ss_base_model_version"], found["ss_v2"]) == ("sdxl_base_v1-0", "False")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    base = generated(pipeline)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    with_file = generated(pipeline)
    pipeline.unload_lora_weights()
    pipeline.unet = load_generation_unet(find_weights(str(run)), torch.float32)
    own = generated(pipeline)
    assert np.abs(with_file - own).max() < UNSEEN < np.abs(base - own).max()


def test_the_file_is_read_again_as_a_lora_from_elsewhere(exported, run, folder):
    file = exported(run, "--lora_only", "--dtype", "fp32")
    one, other = (
        load_generation_unet(weights, torch.float32).state_dict()
        for weights in (find_weights(str(folder), loras=[str(file)]), find_weights(str(run)))
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_lora_changes_the_second_text_encoder_too(folder, tmp_path):
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    down, up = torch.randn(2, 128), torch.randn(128, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "te2.safetensors")
    weights, parts = find_weights(str(folder), loras=[str(tmp_path / "te2.safetensors")]), {}
    for part in ("text_encoder", "text_encoder_2"):
        before = load_text_encoder(folder, part).state_dict()
        after = load_generation_text_encoder(weights, part).state_dict()
        parts[part] = [name for name in before if not torch.equal(before[name], after[name])]
    assert parts["text_encoder"] == [] and len(parts["text_encoder_2"]) == 1


def test_a_full_size_loras_names_are_those_of_kohyas_scripts():
    """560 attention layers at the places of XL's own code (networks/lora.py on sdxl_original_unet.py)."""
    with torch.device("meta"):
        weights = list(UNet2DConditionModel(**SDXL).state_dict())
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    layer = LoraLayer(torch.zeros(4, 8), torch.zeros(8, 4), 8.0)
    layers = {name: layer for name in names if name.endswith(tuple(LORA_TARGETS))}
    written = to_kohya(ldm_names(layers, weights), torch.float16)
    depths = {f"input_blocks_{n}_1": 2 if n < 6 else 10 for n in (4, 5, 7, 8)} | {"middle_block_1": 10}
    depths |= {f"output_blocks_{n}_1": 10 if n < 3 else 2 for n in range(6)}
    blocks = [f"{place}_transformer_blocks_{block}" for place, depth in depths.items() for block in range(depth)]
    attentions = [f"lora_unet_{block}_attn{number}" for block in blocks for number in (1, 2)]
    expected = {f"{attention}_to_{which}" for attention in attentions for which in ("q", "k", "v", "out_0")}
    assert {name.partition(".")[0] for name in written} == expected
    assert len(expected) == 560 and len(written) == 3 * 560
