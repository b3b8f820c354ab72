"""export_checkpoint.py and LoRAs: a run's as a file for other programs, and others' fused into a base."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bases.ldm_keys import unet_key_map
from export_checkpoint import parse_args
from exporting import lora_file
from exporting.export import export_checkpoint, generate_test_image
from exporting.lora_file import export_lora, to_kohya
from generation.weights import find_weights, load_generation_unet
from models.folders import read_shape
from models.loading import load_text_encoder, load_unet
from models.lora import LORA_FILE, lora_config, lora_layers, write_lora
from runtime.errors import UserError, WorkError
from unet_configs import SD15, SD21

UNSEEN = 1e-3  # of a pixel's range of 1: rounding


@pytest.fixture(scope="module")
def trained(tiny_model, captioned_folder, tmp_path_factory) -> tuple[Path, Path]:
    """(A LoRA of rank 4 with alpha 8, the whole UNet of another run)"""
    from train_text_to_image import parse_args as training_args
    from training.train import train

    where = tmp_path_factory.mktemp("runs")
    usual = ["--pretrained_model_name_or_path", tiny_model, "--dataset", captioned_folder, "--max_train_steps", 2]
    usual += ["--learning_rate", 1e-1, "--lr_scheduler", "constant", "--checkpointing_steps", 1]
    usual += ["--trigger", "sks jeans"]
    for name, flags in {"lora": ["--lora_rank", 4, "--lora_alpha", 8], "whole": []}.items():
        train(training_args([str(word) for word in [*usual, "--output_dir", where / name, *flags]]))
    return where / "lora", where / "whole"


@pytest.fixture
def exported(trained, tmp_path, capsys):
    """`exported(flag, ...)` is the LoRA's file; what was printed is `exported.output`."""

    def export(*flags: object, model: Path = trained[0]) -> Path:
        words = ["--model", model, "--to", tmp_path / "jeans.safetensors", "--lora_only", *flags]
        export_lora(parse_args(list(map(str, words))))
        export.output = capsys.readouterr().out
        return tmp_path / "jeans.safetensors"

    return export


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- the file -------------------------------------------------------------------------------------------------------


def test_plain_diffusers_generates_the_runs_own_picture_with_the_file(exported, trained, tiny_model):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)

    def picture(file: Path | None = None) -> np.ndarray:
        if file:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
        image = generate_test_image(pipeline, "denim jeans", read_shape(tiny_model))
        if file:
            pipeline.unload_lora_weights()
        return image

    half, base = picture(exported()), picture()
    exact_file = exported("--dtype", "fp32", "--overwrite")
    exact, weak_file = picture(exact_file), exact_file.with_name("weak.safetensors")
    save_file({name: t for name, t in load_file(exact_file).items() if not name.endswith(".alpha")}, weak_file)
    weak = picture(weak_file)
    pipeline.unet = load_generation_unet(find_weights(str(trained[0])), torch.float32)
    own = picture()
    assert np.abs(exact - own).max() < UNSEEN > np.abs(half - own).max()
    assert np.abs(base - own).max() > 2 * UNSEEN < np.abs(weak - own).max()


def test_a_lora_of_stable_diffusion_2_makes_the_same_picture_in_plain_diffusers(sd2_model, trained, tmp_path):
    """Linear projections, v prediction, OpenCLIP."""
    run, unet = tmp_path / "run", load_unet(sd2_model)
    unet.add_adapter(lora_config(4, 8.0))
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    write_lora(unet, run)
    facts = json.loads((trained[0] / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "base_model": str(sd2_model)}))
    words = ["--model", run, "--to", tmp_path / "sd2.safetensors", "--lora_only", "--dtype", "fp32"]
    export_lora(parse_args(list(map(str, words))))
    assert metadata(tmp_path / "sd2.safetensors")["ss_v2"] == "True"

    def picture() -> np.ndarray:
        return generate_test_image(pipeline, "denim jeans", read_shape(sd2_model))

    pipeline = StableDiffusionPipeline.from_pretrained(sd2_model, dtype=torch.float32)
    base = picture()
    pipeline.load_lora_weights(tmp_path, weight_name="sd2.safetensors")
    exported = picture()
    pipeline.unload_lora_weights()
    pipeline.unet = load_generation_unet(find_weights(str(run)), torch.float32)
    own = picture()
    assert np.abs(exported - own).max() < UNSEEN and np.abs(base - own).max() > 2 * UNSEEN


def test_a_lora_whose_base_has_moved_is_written_with_the_base_named(exported, trained, tiny_model, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "base_model": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=f"{tmp_path / 'gone'} is gone.*--model BASE --lora {run}"):
        exported(model=run)
    file = exported("--lora", run, model=tiny_model)
    found, trigger = load_file(file), metadata(file)["modelspec.trigger_phrase"]
    expected = load_file(exported("--overwrite"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert trigger == "sks jeans"


def test_by_kohyas_rule_the_strength_is_the_runs(exported, trained, tiny_model):
    """weight + alpha / rank * up @ down, as networks/lora.py has it."""
    base = load_unet(tiny_model).state_dict()
    own = load_generation_unet(find_weights(str(trained[0])), torch.float32).state_dict()
    weights = load_file(exported("--dtype", "fp32"))
    layers = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_"): key for key in base}
    names = {name.partition(".")[0] for name in weights}
    assert weights.keys() == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    for name in names:
        down, up, alpha = (weights[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert len(down) == 4 and alpha == 8
        assert torch.allclose(own[layers[name]], base[layers[name]] + alpha / len(down) * up @ down, atol=1e-5)
    changed = {layers[name] for name in names}
    assert all(torch.equal(own[key], base[key]) for key in base.keys() - changed)


def comfyui_names() -> set[str]:
    """The names of attention layers that ComfyUI's key map has for Stable Diffusion 1.x and 2.x.

    `model_lora_keys_unet` in comfy/lora.py: `lora_unet_` and a name of diffusers' with _ for each dot; those names
    come from the LDM's own numbers, four levels of two layers with attention in the first three.
    """
    places = [f"down_blocks.{level}.attentions.{i}" for level in (0, 1, 2) for i in range(2)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{level}.attentions.{i}" for level in (1, 2, 3) for i in range(3)]
    layers = [f"attn{number}.to_{which}" for number in (1, 2) for which in ("q", "k", "v", "out.0")]
    names = {f"{place}.transformer_blocks.0.{layer}" for place in places for layer in layers}
    return {"lora_unet_" + name.replace(".", "_") for name in names}


@pytest.mark.parametrize("config", [SD15, SD21], ids=["1.5", "2.1"])
def test_comfyuis_key_map_has_every_key_of_a_full_size_lora(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        ldm_keys = unet_key_map(unet.state_dict())
        unet.add_adapter(lora_config(4, 8.0))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    written = to_kohya(lora_layers({f"unet.{name}": tensor for name, tensor in state.items()}, 8.0), torch.float16)
    names = {name.partition(".")[0] for name in written}
    assert names == comfyui_names() and len(written) == 3 * 128
    # What such a name stands for: one weight of the model, of the matrices' size.
    patched = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_"): ldm_keys[key] for key in ldm_keys}
    assert len({patched[name] for name in names}) == 128
    assert patched["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"] == (
        "input_blocks.4.1.transformer_blocks.0.attn2.to_out.0.weight"
    )


def test_the_metadata_name_base_trigger_and_strength(exported, tiny_model, captioned_folder):
    found = metadata(exported("--title", "My jeans"))
    expected = {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "My jeans",
        "modelspec.trigger_phrase": "sks jeans",
        "modelspec.description": f"a LoRA of rank 4 and alpha 8 for {tiny_model.name}",
        "modelspec.prediction_type": "epsilon",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8.0",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": tiny_model.name,
        "ss_output_name": "My jeans",
        "ss_max_train_steps": "2",
        "ss_num_train_images": "3",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert json.loads(found["ss_tag_frequency"]) == {captioned_folder.name: {"sks jeans": 3}}
    assert str(tiny_model.parent) not in "".join(found.values())  # nobody else's business
    assert "trigger phrase: sks jeans" in exported.output and "verified" in exported.output
    assert "only diffusers loads it" in exported.output  # the tiny base


def test_a_checkpoints_lora_is_written_in_each_precision(exported, trained):
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    files = (trained[0] / "checkpoint-1" / LORA_FILE, trained[0] / LORA_FILE)
    own, last = (load_file(file)[f"unet.{layer}.lora.up.weight"] for file in files)
    assert own.abs().max() > 0 and not torch.equal(own, last)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = load_file(exported("--checkpoint", "checkpoint-1", "--dtype", name, "--overwrite"))
        assert torch.equal(found[f"lora_unet_{layer.replace('.', '_')}.lora_up.weight"], own.to(dtype))


def test_inference_reads_the_file_back(exported, trained, tiny_model):
    again = find_weights(str(tiny_model), loras=[str(exported("--dtype", "fp32"))])
    one, other = (
        load_generation_unet(weights, torch.float32).state_dict() for weights in (again, find_weights(str(trained[0])))
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_read_back_as_it_was_is_not_kept(exported, monkeypatch, tmp_path):
    def with_alpha_of_the_rank(layers, dtype):
        return {n: torch.tensor(4.0) if n.endswith(".alpha") else t for n, t in to_kohya(layers, dtype).items()}

    def without_its_prefix(layers, dtype):
        return {name.removeprefix("lora_unet_"): tensor for name, tensor in to_kohya(layers, dtype).items()}

    monkeypatch.setattr(lora_file, "to_kohya", with_alpha_of_the_rank)
    with pytest.raises(WorkError, match="layers differ"):
        exported()
    monkeypatch.setattr(lora_file, "to_kohya", without_its_prefix)
    with pytest.raises(WorkError, match="not kept"):
        exported()
    assert list(tmp_path.iterdir()) == []


def test_only_a_run_of_a_lora_has_one_to_write(exported, trained, tiny_model, tmp_path):
    for model in (trained[1], tiny_model):
        with pytest.raises(UserError, match=f"--lora_only: {model} is no LoRA"):
            exported(model=model)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_unless_overwrite_is_given(exported, tmp_path):
    (tmp_path / "jeans.safetensors").write_text("mine")
    (tmp_path / "jeans.yaml").write_text("of a model of that name")
    with pytest.raises(UserError, match="jeans.safetensors exists"):
        exported()
    assert (tmp_path / "jeans.safetensors").read_text() == "mine"
    exported("--overwrite")
    assert (tmp_path / "jeans.yaml").read_text() == "of a model of that name"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "x", "--lora_only", "--lora", "y", "--lora", "z"], "--lora_only"),
        (["--model", "x", "--lora_only", "--lora_scale", "0.5"], "--lora_only"),
        (["--lora", "y"], "--lora needs --model"),
        (["--model", "x", "--lora", "y", "--lora_scale", "-1"], "--lora_scale"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, named):
    with pytest.raises(UserError, match=named):
        parse_args(["--to", "x.safetensors", *flags])


def test_the_closing_lines_of_a_run_name_the_command(train_run, capsys, monkeypatch, tmp_path):
    train_run("mine", "--lora_rank", 2, "--max_train_steps", 1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "--lora_only" in line]
    words = shlex.split(line[line.index("python") :])
    assert Path(words[1]).name == "export_checkpoint.py"
    monkeypatch.chdir(tmp_path)
    export_lora(parse_args(words[2:]))
    assert Path("mine.safetensors").is_file()
    train_run("whole", "--max_train_steps", 1)
    assert "--lora_only" not in capsys.readouterr().out


# --- others' LoRAs --------------------------------------------------------------------------------------------------


def test_a_lora_from_elsewhere_is_fused_into_a_base_with_its_scale(tiny_model, trained, tmp_path):
    """One in kohya's names for the UNet and the text encoder, and one of ours on top."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {}
    torch.manual_seed(0)
    text_layer = "text_model_encoder_layers_0_self_attn_{}_proj"
    for name in (f"unet_{layer.replace('.', '_')}", *(f"te_{text_layer.format(which)}" for which in ("q", "out"))):
        name = f"lora_{name}"
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, 16), f"{name}.lora_up.weight": torch.randn(16, 2)}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "style.safetensors")
    downs, ups = ([t for name, t in tensors.items() if name.endswith(end)] for end in ("down.weight", "up.weight"))
    added = [0.8 / 2 * up @ down for down, up in zip(downs, ups, strict=True)]

    words = ["--model", tiny_model, "--to", tmp_path / "fused.safetensors", "--dtype", "fp32"]
    words += ["--lora", tmp_path / "style.safetensors", "--lora_scale", 0.8, "--lora", trained[0], "--lora_scale", 1]
    export_checkpoint(parse_args(list(map(str, words))))
    found = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "fused.safetensors"), config=str(tiny_model), dtype=torch.float32
    )
    own = load_generation_unet(find_weights(str(trained[0])), torch.float32).state_dict()
    unet = found.unet.state_dict()
    assert torch.allclose(unet[f"{layer}.weight"], own[f"{layer}.weight"] + added[0], atol=1e-5)
    assert all(torch.allclose(unet[key], own[key], atol=1e-6) for key in own.keys() - {f"{layer}.weight"})
    text, plain = found.text_encoder.state_dict(), load_text_encoder(tiny_model).state_dict()
    keys = [next(k for k in plain if k.endswith(f"layers.0.self_attn.{w}_proj.weight")) for w in ("q", "out")]
    for key, change in zip(keys, added[1:], strict=True):
        assert torch.allclose(text[key], plain[key] + change, atol=1e-5)
    assert all(torch.equal(text[name], plain[name]) for name in plain.keys() - {*keys})
