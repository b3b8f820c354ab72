"""One-file checkpoints: a folder is made of them once, with the same bits, or they are refused with what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bases import one_file
from bases.checking import check_model
from bases.ldm_keys import StateDict
from export_checkpoint import parse_args
from exporting.export import export_checkpoint
from models.loading import load_noise_scheduler, load_unet
from one_file_models import as_ema, make_model, set_zero_snr, write_one_file
from runtime.errors import UserError, WorkError

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
VELOCITY = {"modelspec.prediction_type": "v"}


def same(one: StateDict, other: StateDict) -> bool:
    return one.keys() == other.keys() and all(
        weight.dtype == other[key].dtype and torch.equal(weight, other[key]) for key, weight in one.items()
    )


def part_of(folder: Path, part: str) -> StateDict:
    return {name.removeprefix("text_model."): w for name, w in load_file(folder / part / WEIGHTS[part]).items()}


def export(folder: Path, to: Path, dtype: str, tokenizer: Path | None = None) -> Path:
    words = ["--model", folder, "--to", to, "--dtype", dtype, "--no_verify"]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    export_checkpoint(parse_args([str(word) for word in words]))
    return to


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [1, 2])
def test_folder_to_file_to_folder_to_file_changes_no_bit(convert, tmp_path, version, dtype):
    prediction = "v_prediction" if version == 2 else "epsilon"
    folder = make_model(tmp_path / "model", version, prediction, DTYPES[dtype])
    file = export(folder, tmp_path / "first.safetensors", dtype)
    converted = convert(file)
    for part in WEIGHTS:
        assert same(part_of(converted, part), part_of(folder, part))
    assert same(load_file(export(converted, tmp_path / "second.safetensors", dtype)), load_file(file))
    assert same(load_file(export(file, tmp_path / "third.safetensors", dtype, folder)), load_file(file))


@pytest.mark.parametrize("version", [1, 2])
def test_the_folder_generates_the_same_picture(convert, file_of, folders, version):
    pictures = []
    for folder in (folders[version], convert(file_of(version))):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        pictures.append(pipeline("jeans", generator=torch.Generator().manual_seed(3), **settings).images.numpy())
    assert np.array_equal(*pictures)


def test_the_24th_layer_of_open_clip_is_left_out_as_stable_diffusion_2_never_uses_it(convert, weights, tmp_path):
    layer = "cond_stage_model.model.transformer.resblocks.0."
    first = {name.removeprefix(layer): w for name, w in weights[2].items() if name.startswith(layer)}
    layers = {layer.replace("0.", f"{n}.") + name: w.clone() for n in range(2, 24) for name, w in first.items()}
    unused = {"cond_stage_model.model.text_projection": torch.zeros(64, 64), "betas": torch.zeros(10)}
    folder = convert(write_one_file(tmp_path / "m.safetensors", weights[2] | layers | unused, VELOCITY))
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 23
    assert len({name.split(".")[2] for name in part_of(folder, "text_encoder") if ".layers." in name}) == 23


def test_a_text_encoder_without_the_wrapper_in_its_names_is_read(convert, weights, folders, tmp_path):
    renamed = {name.replace(".text_model.", "."): weight for name, weight in weights[1].items()}
    renamed["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    folder = convert(write_one_file(tmp_path / "m.safetensors", renamed))
    assert same(part_of(folder, "text_encoder"), part_of(folders[1], "text_encoder"))


def test_weights_of_two_precisions_become_fp32_and_keep_their_values(convert, file_of, weights):
    name = "model.diffusion_model.out.2.weight"
    unet = part_of(convert(file_of(1, {name: weights[1][name].half()})), "unet")
    assert {weight.dtype for weight in unet.values()} == {torch.float32}
    assert torch.equal(unet["conv_out.weight"], weights[1][name].half().float())


def test_a_file_may_be_in_fp64_as_a_folder_may(convert, file_of, weights):
    doubled = {key: weight.double() for key, weight in weights[1].items()}
    folder = convert(file_of(1, doubled))
    check_model(folder)
    assert load_unet(folder).dtype == torch.float32


@pytest.mark.parametrize("version", [1, 2])
def test_zero_terminal_snr_is_kept_both_ways(convert, tmp_path, version):
    folder = make_model(tmp_path / "model", version, "v_prediction")
    set_zero_snr(folder)
    file = export(folder, tmp_path / "first.safetensors", "fp32")
    converted = convert(file)
    for config in (load_noise_scheduler(f).config for f in (folder, converted)):
        assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
    assert same(load_file(export(converted, tmp_path / "second.safetensors", "fp32")), load_file(file))


# --- once, and whole or absent --------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_another_content_goes_elsewhere(convert, file_of, folders, tmp_path, capsys):
    first = convert(file_of(1))
    assert "converting" in capsys.readouterr().out and first.name.startswith("m-")
    made = (first / "unet").stat().st_mtime_ns
    assert convert(file_of(1)) == first and (first / "unet").stat().st_mtime_ns == made
    assert not capsys.readouterr().out
    other_tokenizer = shutil.copytree(folders[1] / "tokenizer", tmp_path / "other")
    (other_tokenizer / "special_tokens_map.json").write_text("{}")
    middle = {"first_stage_model.encoder.conv_in.bias": torch.ones(32)}  # neither its size nor its ends differ
    several = [first, convert(file_of(1), other_tokenizer), convert(file_of(1, middle))]
    (tmp_path / "m.yaml").write_text("model: {params: {parameterization: v}}")
    assert len({*several, convert(file_of(1))}) == 4


def test_a_file_that_has_not_changed_is_not_read_again(convert, file_of, monkeypatch):
    file, read = file_of(1), []
    first = convert(file)
    hash_content = one_file._hash_content
    monkeypatch.setattr(one_file, "_hash_content", lambda *words: read.append(words) or hash_content(*words))
    assert convert(file) == first and not read
    file_of(1)
    assert convert(file) == first and len(read) == 1
    assert convert(file) == first and len(read) == 1
    (first / "source.json").write_text("[")
    assert convert(file) == first and len(read) == 2


def test_what_was_made_of_a_file_is_used_where_the_file_or_its_tokenizer_is_gone(
    convert, file_of, folders, tmp_path, capsys
):
    tokenizer = shutil.copytree(folders[1] / "tokenizer", tmp_path / "words")
    file = file_of(1)
    convert(file, tokenizer)
    second = convert(file_of(1, {"first_stage_model.encoder.conv_in.bias": torch.ones(32)}), tokenizer)
    shutil.rmtree(tokenizer)
    capsys.readouterr()
    assert convert(file, tokenizer) == second and f"gone: {tokenizer};" in capsys.readouterr().out
    file.unlink()
    assert convert(file, tokenizer) == second and f"gone: {file}, {tokenizer};" in capsys.readouterr().out
    assert convert(file, folders[1]) == second and f"gone: {file};" in capsys.readouterr().out
    for other in (file.with_name("n.safetensors"), file.with_name("n.ckpt")):
        with pytest.raises(UserError, match=rf"{other.name}: no such file.*where it is now"):
            convert(other, folders[1], allow_pickle=True)


def test_what_fails_half_way_leaves_nothing(convert, file_of, outputs, monkeypatch):
    written = []

    def fail_at_the_vae(state_dict, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(state_dict, path, metadata)

    monkeypatch.setattr("bases.one_file.save_file", fail_at_the_vae)
    with pytest.raises(WorkError, match="converted: .*No space"):
        convert(file_of(1))
    assert list((outputs / "converted").iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(convert, file_of, outputs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(WorkError, match="1e-06 GB are free"):
        convert(file_of(1))
    assert not outputs.exists()


def test_the_space_that_is_needed_is_that_of_the_folder(convert, file_of, weights, outputs, monkeypatch):
    half = {name: w.half() for name, w in weights[1].items() if name.startswith("model.") and ".out.2." not in name}
    file = file_of(1, half)  # its UNet becomes fp32, as not all of it is fp16
    size = sum(weight.numel() * 4 for weight in weights[1].values())
    assert file.stat().st_size < size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, size - 1))
    with pytest.raises(WorkError, match="free"):
        convert(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, size))
    assert convert(file).is_dir()


# --- EMA ------------------------------------------------------------------------------------------------------------


def test_of_two_sets_of_weights_those_that_other_programs_use_are_taken(convert, file_of, weights, folders, capsys):
    ema = {name: weight + 1 for name, weight in as_ema(weights[1]).items()}
    folder = convert(file_of(1, ema))
    assert same(part_of(folder, "unet"), part_of(folders[1], "unet"))
    assert "those of their EMA (model_ema.*) left out" in capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 2])
def test_of_a_file_with_an_average_alone_that_is_taken(convert, file_of, weights, folders, capsys, version):
    only = as_ema(weights[version]) | {name: None for name in weights[version] if name.startswith("model.")}
    folder = convert(file_of(version, only))
    assert same(part_of(folder, "unet"), part_of(folders[version], "unet"))
    assert "the weights of the EMA (model_ema.*) are taken, as it has no others" in capsys.readouterr().out


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "changes", "complaint"),
    [
        (1, {"model.diffusion_model.out.0.bias": None}, r"missing: model\.diffusion_model\.out\.0\.bias$"),
        (1, {"first_stage_model.quant_conv.bias": None}, r"missing: first_stage_model\.quant_conv\.bias$"),
        (2, {"cond_stage_model.model.ln_final.bias": None}, r"missing: cond_stage_model\.model\.ln_final\.bias$"),
        (1, {"model.diffusion_model.extra": torch.zeros(1)}, r"does not have: model\.diffusion_model\.extra$"),
        (2, {"something.else": torch.zeros(1)}, r"2\.x does not have: something\.else$"),
        (1, {"model.diffusion_model.out.0.bias": torch.zeros(3)}, r"other sizes.*out\.0\.bias \(3,\)"),
        (1, {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(3)}, "unCLIP"),
        (1, {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}, "inpainting"),
        (1, {"model.diffusion_model.out.0.bias": torch.zeros(64, dtype=torch.int8)}, "its unet is stored as I8"),
        (1, {TOKENS: torch.zeros(3)}, "not built as Stable Diffusion's are"),
        (1, {TOKENS: torch.zeros(3, 64, 1)}, r"token_embedding\.weight \(3, 64, 1\)"),
        (1, {"conditioner.embedders.0.x": torch.zeros(1)}, "Diffusion 1.x does not have: conditioner"),
        (1, {"conditioner.embedders.0.model.x": torch.zeros(1)}, "the refiner of Stable Diffusion XL"),
        (1, {TOKENS: None}, "no text encoder"),
        (1, {"first_stage_model.encoder.conv_in.weight": None}, "no VAE"),
        (1, {"model.diffusion_model.input_blocks.0.0.weight": None}, "no model.diffusion_model"),
    ],
)  # fmt: skip
def test_what_is_not_a_whole_model_is_refused_by_name(convert, file_of, outputs, version, changes, complaint):
    file = file_of(version, changes)
    with pytest.raises(UserError, match=f"--model {file}: .*{complaint}") as error:
        convert(file)
    assert "\n" not in str(error.value) and not list(outputs.glob("converted/*"))


def test_many_missing_weights_are_counted(convert, file_of, weights):
    without = {name: None for name in weights[1] if ".middle_block.0." in name}
    with pytest.raises(UserError, match=rf"middle_block\.0.*and {len(without) - 5} more$"):
        convert(file_of(1, without))


def test_pickles_need_leave_and_are_refused_under_another_name(convert, weights, folders, tmp_path):
    torch.save({"state_dict": weights[1], "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"model\.ckpt: a pickle.*--allow_pickle"):
        convert(tmp_path / "model.ckpt")
    folder = convert(tmp_path / "model.ckpt", allow_pickle=True)
    assert all(same(part_of(folder, part), part_of(folders[1], part)) for part in WEIGHTS)
    shutil.copyfile(tmp_path / "model.ckpt", tmp_path / "renamed.safetensors")
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"renamed\.safetensors: a pickle, though it is named"):
            convert(tmp_path / "renamed.safetensors", allow_pickle=allowed)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_else_a_pickle_holds_is_left_out(convert, weights, folders, tmp_path):
    odd = {3: torch.zeros(1), ("a", "b"): torch.zeros(1), "sparse": torch.zeros(2, 2).to_sparse()}
    torch.save(weights[1] | odd, tmp_path / "model.ckpt")
    folder = convert(tmp_path / "model.ckpt", allow_pickle=True)
    assert all(same(part_of(folder, part), part_of(folders[1], part)) for part in WEIGHTS)


def test_a_pickle_that_would_run_code_is_refused(convert, tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    torch.save({"state_dict": Harmful()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"model\.ckpt: cannot be read as weights alone"):
        convert(tmp_path / "model.ckpt", allow_pickle=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a whole"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x02}q", "pickle"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(convert, tmp_path, content, complaint):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        convert(tmp_path / "m.safetensors")


def test_half_a_download_and_other_kinds_of_file_are_refused(convert, file_of, tmp_path):
    file = file_of(1)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="download it again"):
        convert(file)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: not a model"):
        convert(tmp_path / "model.gguf")


def test_the_result_is_a_folder_like_any_other(convert, file_of, weights):
    folder = convert(file_of(1))
    assert torch.equal(load_unet(folder).conv_out.bias, weights[1]["model.diffusion_model.out.2.bias"])
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {
        (folder / "model_index.json").stat().st_mode & 0o777
    }
