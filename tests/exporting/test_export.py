"""export_checkpoint.py: the file has the layout other programs expect, the exact weights, and is whole or absent."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clone import ROOT
from export_checkpoint import parse_args
from exporting import export
from exporting.export import export_checkpoint
from models.loading import load_text_encoder
from runtime.errors import UserError, WorkError
from runtime.paths import STARTER
from tiny_model import add_safety_checker


@pytest.fixture
def exported(tmp_path, capsys):
    """Exports in this process: `exported(model, flag, ...)` is the file; what was printed is `exported.output`."""

    def run(model: Path, *flags: object, name: str = "jeans.safetensors") -> Path:
        export_checkpoint(parse_args(["--model", str(model), "--to", str(tmp_path / name), *map(str, flags)]))
        run.output = capsys.readouterr().out
        return tmp_path / name

    return run


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def generated(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(3)}
    return pipeline("denim jeans on white", output_type="np", **settings).images[0]


def read_back(path: Path, model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_single_file(str(path), config=str(model), dtype=torch.float32)


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_generates_the_same_image_with_the_file(exported, own_model, sd2_model, version):
    model = {1: own_model, 2: sd2_model}[version]
    path = exported(model, "--dtype", "fp32")
    assert "verified" in exported.output and not list(path.parent.glob(".*.part"))
    whole = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert np.abs(generated(read_back(path, model)) - generated(whole)).max() < 1e-4


@pytest.mark.slow
def test_the_script_writes_the_starter_model(tmp_path):
    words = ["--model", STARTER, "--to", tmp_path / "starter.safetensors"]
    done = subprocess.run(
        [sys.executable, ROOT / "text_to_image" / "export_checkpoint.py", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert "552 weights read back are equal" in done.stdout and "will not load it" in done.stdout
    weights = load_file(tmp_path / "starter.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_a_model_is_exported_without_the_safety_checker_that_it_lacks(exported, own_model):
    add_safety_checker(own_model)
    shutil.rmtree(own_model / "safety_checker")
    shutil.rmtree(own_model / "feature_extractor")
    exported(own_model)
    assert "verified" in exported.output


def test_each_precision_holds_the_rounded_weights(exported, sd2_model):
    own = load_file(sd2_model / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        written = load_file(exported(sd2_model, "--dtype", name, "--no_verify", name=f"{name}.safetensors"))
        assert torch.equal(written["model.diffusion_model.input_blocks.0.0.weight"], own.to(dtype))
        assert {weight.dtype for weight in written.values()} == {dtype}
    assert "not verified" in exported.output


def test_the_text_encoders_keys_show_the_version(exported, own_model, sd2_model):
    one, two = (load_file(exported(m, name=f"{i}.safetensors")) for i, m in enumerate((own_model, sd2_model)))
    clip, open_clip = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
    assert clip + "embeddings.position_embedding.weight" in one and not [n for n in one if n.startswith(open_clip)]
    assert open_clip + "token_embedding.weight" in two and not [n for n in two if n.startswith(clip)]
    assert two[open_clip + "transformer.resblocks.2.attn.in_proj_weight"].shape == (48, 16)
    for weights in (one, two):
        assert all(
            n.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for n in weights
        )


def test_either_layout_of_the_text_encoder_on_disk_gives_the_same_file(exported, own_model):
    plain = exported(own_model, name="plain.safetensors")
    path = own_model / "text_encoder" / "model.safetensors"
    flat = {name.removeprefix("text_model."): weight for name, weight in load_file(path).items()}
    for name, prefix in (("flat", ""), ("wrapped", "text_model.")):
        save_file({prefix + key: weight for key, weight in flat.items()}, path, {"format": "pt"})
        again = load_file(exported(own_model, name=f"{name}.safetensors"))
        assert all(torch.equal(weight, again[key]) for key, weight in load_file(plain).items())


def test_a_lora_is_fused_into_its_base_and_its_trigger_phrase_is_in_the_file(exported, tiny_model, train_run):
    trained = train_run(
        "lora", "--lora_rank", 2, "--learning_rate", 1e-1, "--lr_scheduler", "constant", "--max_train_steps", 2,
        "--trigger", "sks jeans",
    )  # fmt: skip
    path = exported(trained, "--dtype", "fp32")
    assert "verified" in exported.output and "trigger phrase: sks jeans" in exported.output
    assert metadata(path)["modelspec.trigger_phrase"] == "sks jeans"
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    base = generated(pipeline)
    pipeline.load_lora_weights(trained)
    expected, found = generated(pipeline), generated(read_back(path, tiny_model))
    assert np.abs(found - expected).max() < 1e-3 < np.abs(base - expected).max()


# --- metadata -----------------------------------------------------------------------------------------------------


def test_metadata_follow_modelspec_and_the_hash_is_that_of_the_weights(exported, own_model):
    sizes = [{"height": 48, "width": 80, "pictures": 1}, {"height": 72, "width": 56, "pictures": 3}]
    run = {"sizes": sizes, "finished_at": "2026-01-02T03:04:05+00:00", "arguments": {"trigger": None}}
    (own_model / "run.json").write_text(json.dumps(run))
    path = exported(own_model)
    content = path.read_bytes()
    weights = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata(path) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": "jeans",
        "modelspec.resolution": "56x72",
        "modelspec.prediction_type": "epsilon",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(weights).hexdigest()}",
    }
    again = exported(own_model, "--title", "My jeans", name="again.safetensors")
    assert metadata(again)["modelspec.title"] == "My jeans"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((own_model / "run.json").stat().st_mode)


def test_a_yaml_is_written_only_where_automatic1111_needs_it(exported, own_model, sd2_model):
    assert not exported(own_model).with_suffix(".yaml").exists()
    config = yaml.safe_load(exported(sd2_model, name="two.safetensors").with_suffix(".yaml").read_text())
    assert config["model"]["params"]["parameterization"] == "v"
    assert "OpenCLIP" in config["model"]["params"]["cond_stage_config"]["target"]
    scheduler = own_model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    path = exported(own_model, "--no_verify", name="velocity.safetensors")
    config = yaml.safe_load(path.with_suffix(".yaml").read_text())
    assert config["model"]["params"]["cond_stage_config"]["target"].endswith(".FrozenCLIPEmbedder")
    assert metadata(path)["modelspec.prediction_type"] == "v"


# --- whole or absent ------------------------------------------------------------------------------------------------


def test_a_file_that_does_not_read_back_as_it_was_is_not_kept(exported, own_model, monkeypatch):
    def q_and_k_swapped(weights):
        first, second = (f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{which}.weight" for which in "qk")
        return unet_to_ldm({**weights, first: weights[second], second: weights[first]})

    unet_to_ldm = export.unet_to_ldm
    monkeypatch.setattr(export, "unet_to_ldm", q_and_k_swapped)
    with pytest.raises(WorkError, match=r"2 weights of the unet differ \(down_blocks.1"):
        exported(own_model)
    monkeypatch.setattr(export, "unet_to_ldm", unet_to_ldm)
    monkeypatch.setattr(export, "text_encoder_to_ldm", lambda state_dict, encoder: {})
    with pytest.raises(WorkError, match="cannot read it back"):  # though the folder has a text encoder
        exported(own_model)
    monkeypatch.undo()
    folder = exported(own_model).parent
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["jeans.safetensors"]


def test_an_existing_file_or_yaml_is_replaced_only_with_overwrite(exported, own_model, tmp_path):
    (tmp_path / "jeans.safetensors").write_text("mine")
    with pytest.raises(UserError, match="jeans.safetensors exists"):
        exported(own_model)
    assert (tmp_path / "jeans.safetensors").read_text() == "mine"
    (tmp_path / "other.yaml").write_text("of another file")
    with pytest.raises(UserError, match="other.yaml exists"):
        exported(own_model, name="other.safetensors")
    exported(own_model, "--overwrite", "--no_verify")
    exported(own_model, "--overwrite", "--no_verify", name="other.safetensors")
    assert load_file(tmp_path / "jeans.safetensors") and not (tmp_path / "other.yaml").exists()


def test_a_full_disk_is_found_before_any_weight_is_read(own_model, tmp_path, monkeypatch, exported):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(WorkError, match="the file takes .* GB, 1e-06 GB are free"):
        exported(own_model)


def test_a_weight_too_large_for_the_precision_is_named(exported, own_model):
    encoder = load_text_encoder(own_model)
    encoder.final_layer_norm.weight.data[0] = 1e6
    encoder.save_pretrained(own_model / "text_encoder", safe_serialization=True)
    with pytest.raises(UserError, match="final_layer_norm.weight is infinite .* --dtype bf16"):
        exported(own_model)
    assert exported(own_model, "--dtype", "bf16").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--to", "jeans.ckpt"], "--to jeans.ckpt: name a file that ends in .safetensors"),
        (["--to", "nowhere/jeans.safetensors"], "no folder nowhere"),
        (["--to", "jeans.safetensors", "--model", "empty"], "--model empty"),
        (["--dtype", "fp8", "--to", "jeans.safetensors"], "--dtype"),
        ([], "--to"),
    ],
)
def test_wrong_input_is_refused_by_name(own_model, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=named) as caught:
        export_checkpoint(parse_args(["--model", str(own_model), *flags]))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("jeans*"))


def test_without_a_model_the_newest_finished_run_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr("export_checkpoint.newest_finished_run", lambda: tmp_path)
    assert parse_args(["--to", "x.safetensors"]).model == str(tmp_path)
    monkeypatch.setattr("export_checkpoint.newest_finished_run", lambda: None)
    with pytest.raises(UserError, match="--model is needed"):
        parse_args(["--to", "x.safetensors"])


def test_a_loras_own_prediction_type_wins_over_its_bases(exported, train_run):
    trained = train_run("lora", "--lora_rank", 2, "--max_train_steps", 1, "--prediction_type", "v_prediction")
    path = exported(trained, "--no_verify")
    assert metadata(path)["modelspec.prediction_type"] == "v" and path.with_suffix(".yaml").exists()


def test_checkpoint_exports_that_checkpoint_and_not_the_result(exported, train_run):
    trained = train_run("run", "--max_train_steps", 2, "--checkpointing_steps", 1, "--learning_rate", 0.01)
    first, last, result = (
        load_file(exported(trained, "--no_verify", "--dtype", "fp32", *flags, name=f"{number}.safetensors"))
        for number, flags in enumerate((["--checkpoint", "checkpoint-1"], ["--checkpoint", "latest"], []))
    )
    assert all(torch.equal(last[name], weight) for name, weight in result.items())
    assert any(not torch.equal(first[name], weight) for name, weight in result.items())
