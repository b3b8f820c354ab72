"""Pipelines are loaded part by part and saved so that plain diffusers reads them."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from models.folders import read_shape
from models.loading import (
    load_noise_scheduler,
    load_prompt_encoder,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    quiet_libraries,
    save_pipeline,
    set_attention,
)
from runtime.errors import UserError
from tiny_model import add_safety_checker


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    base = shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "base")
    for name in ("LICENSE.md", "training_defaults.json", "generation_defaults.json", "README.md"):
        (base / name).write_text(f"{name} of the base")
    output = tmp_path_factory.mktemp("saved")
    save_pipeline(load_unet(base), base, output, load_noise_scheduler(base, "v_prediction"))
    return output


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_a_one_line_error_that_names_the_part(own_model, part):
    weights = next((own_model / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    load = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}[part]
    with pytest.raises(UserError, match=f"{part} cannot be loaded") as error:
        load(own_model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named(own_model, part, value):
    file = next((own_model / part).glob("*.safetensors"))
    weights = load_file(file)
    name = max(weights)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, {"format": "pt"})
    load = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}[part]
    with pytest.raises(UserError, match=f"{part} are NaN or infinite: {name.removeprefix('text_model.')}"):
        load(own_model)


def test_pickled_weights_are_not_loaded(own_model):
    weights = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="unet cannot be loaded"):
        load_unet(own_model)


def test_a_half_precision_model_is_loaded_in_the_dtype_asked_for(tiny_model):
    assert json.loads((tiny_model / "text_encoder" / "config.json").read_text())["dtype"] == "float16"
    for load in (load_unet, load_vae, load_text_encoder):
        assert {p.dtype for p in load(tiny_model).parameters()} == {torch.float32}
    for model in (load_unet(tiny_model, torch.bfloat16), load_vae(tiny_model, torch.bfloat16)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_prompt_encoder(tiny_model, 1, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_unets_memory_layout_does_not_change_what_is_saved(layout, tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr("models.loading.convolution_memory_format", lambda: layout)
    unet = load_unet(tiny_model, torch.float16)
    assert unet.conv_in.weight.is_contiguous(memory_format=layout)
    unet.save_pretrained(tmp_path / "unet")
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (tiny_model, tmp_path)
    )
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_prediction_type_is_the_models_unless_overridden(own_model):
    assert load_noise_scheduler(own_model).config.prediction_type == "epsilon"
    assert load_noise_scheduler(own_model, "v_prediction").config.prediction_type == "v_prediction"
    config = own_model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"flow"'))
    with pytest.raises(UserError, match="flow"):
        load_noise_scheduler(own_model)


def test_a_saved_pipeline_has_one_dtype_and_runs_in_plain_diffusers(saved):
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("denim jeans", num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)


def test_a_saved_pipeline_keeps_its_scheduler_except_for_the_prediction_type(saved, tiny_model):
    before, after = (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) for folder in (tiny_model, saved)
    )
    assert after["_class_name"] == "PNDMScheduler"
    assert {key for key in before if before[key] != after[key]} <= {"prediction_type", "_diffusers_version"}
    assert after["prediction_type"] == "v_prediction"


def test_a_saved_pipeline_keeps_the_licence_and_defaults_of_its_base(saved):
    for name in ("LICENSE.md", "training_defaults.json", "generation_defaults.json"):
        assert (saved / name).read_text() == f"{name} of the base"
    assert not (saved / "README.md").exists()  # the base's model card does not describe it


def test_the_saved_vocabulary_is_the_tokenizers(saved, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(saved / "tokenizer" / name, tmp_path / name)
    prompt = "A single pair of denim jeans, 11 (1).JPG — ünïcode 裤"
    assert CLIPTokenizer.from_pretrained(tmp_path)(prompt).input_ids == load_tokenizer(saved)(prompt).input_ids


def test_only_the_progress_bars_of_downloads_show():
    enable_progress_bars()
    quiet_libraries()
    assert not are_progress_bars_disabled()
    assert not diffusers.utils.logging.is_progress_bar_enabled()
    assert not transformers.utils.logging.is_progress_bar_enabled()


def test_attention_is_plain_only_on_the_cpu_at_small_sizes(tiny_model):
    shape = read_shape(tiny_model)

    def kinds(size: int, device: str) -> set[type]:
        unet = load_unet(tiny_model)
        set_attention(unet, shape, size, size, device)
        return {type(processor) for processor in unet.attn_processors.values()}

    assert kinds(64, "cpu") == {AttnProcessor}
    assert AttnProcessor not in kinds(64, "cuda") | kinds(1024, "cpu")


def test_a_schedule_can_be_rescaled_to_zero_terminal_snr(tiny_model):
    assert load_noise_scheduler(tiny_model, "v_prediction", zero_snr=True).alphas_cumprod[-1] == 0
    assert load_noise_scheduler(tiny_model).alphas_cumprod[-1] > 0


# --- the safety checker, and an end that fails ----------------------------------------------------------------------


def save_again(base: Path, output: Path) -> dict:
    """model_index.json of the pipeline that is saved."""
    save_pipeline(load_unet(base), base, output, load_noise_scheduler(base))
    return json.loads((output / "model_index.json").read_text())


def test_a_safety_checker_of_another_variant_than_the_unet_is_kept(own_model, tmp_path):
    add_safety_checker(own_model)
    checker = own_model / "safety_checker" / "model.safetensors"
    checker.rename(checker.with_name("model.fp16.safetensors"))
    index = save_again(own_model, tmp_path / "out")
    assert index["safety_checker"][1] == "StableDiffusionSafetyChecker" and index["requires_safety_checker"] is True
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker


@pytest.mark.parametrize("gone", ["safety_checker", "feature_extractor"])
def test_without_a_safety_checker_that_is_named_the_result_says_null(own_model, tmp_path, gone):
    add_safety_checker(own_model)
    shutil.rmtree(own_model / gone)
    index = save_again(own_model, tmp_path / "out")
    assert index["safety_checker"] == index[gone] == [None, None] and index["requires_safety_checker"] is False
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker is None


def test_the_trained_unet_is_saved_first_and_whole(own_model, tmp_path):
    unet, scheduler = load_unet(own_model), load_noise_scheduler(own_model)
    unet.conv_in.bias.data += 1
    weights = own_model / "vae" / "diffusion_pytorch_model.safetensors"
    away = weights.rename(weights.with_suffix(".away"))
    with pytest.raises(UserError, match="vae"):
        save_pipeline(unet, own_model, tmp_path / "out", scheduler)
    assert torch.equal(load_unet(tmp_path / "out").conv_in.bias, unet.conv_in.bias)
    away.rename(weights)
    unet.conv_in.bias.data += 1
    save_pipeline(unet, own_model, tmp_path / "out", scheduler)  # as the same command does when it is run again
    assert torch.equal(load_unet(tmp_path / "out").conv_in.bias, unet.conv_in.bias)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out")


def test_an_old_unet_that_cannot_be_removed_does_not_keep_the_new_one_out(own_model, tmp_path, monkeypatch):
    """As on a network disk where another process has one of its files open."""
    unet, scheduler = load_unet(own_model), load_noise_scheduler(own_model)
    save_pipeline(unet, own_model, tmp_path / "out", scheduler)
    unet.conv_in.bias.data += 1
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    save_pipeline(unet, own_model, tmp_path / "out", scheduler)
    assert torch.equal(load_unet(tmp_path / "out").conv_in.bias, unet.conv_in.bias)


def test_an_old_unet_that_cannot_be_renamed_is_an_error(own_model, tmp_path, monkeypatch):
    unet, scheduler = load_unet(own_model), load_noise_scheduler(own_model)
    (tmp_path / "out" / "unet").mkdir(parents=True)

    def busy(path: Path, to: Path) -> Path:
        raise OSError(16, "busy", str(path))

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    with pytest.raises(OSError, match="busy"):
        save_pipeline(unet, own_model, tmp_path / "out", scheduler)
    assert not (tmp_path / "out" / "model_index.json").exists()
