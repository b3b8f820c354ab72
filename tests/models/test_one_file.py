"""One-file checkpoints: a folder is made of them once, with the same bits, or they are refused with what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import models.tokenizer_files
from export_checkpoint import parse_args
from exporting.export import export_checkpoint
from models.finding import ModelOptions, find_model
from models.ldm_keys import StateDict
from models.loading import load_noise_scheduler, load_tokenizer, load_unet
from one_file_models import as_ema, ldm_weights, make_model, set_zero_snr, write_one_file
from runtime.errors import UserError, WorkError

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
VELOCITY = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """{version: a small model}: one that predicts noise, and one that predicts velocity, as most of 2.x."""
    where = tmp_path_factory.mktemp("models")
    return {1: make_model(where / "one", 1), 2: make_model(where / "two", 2, "v_prediction")}


@pytest.fixture(scope="module")
def weights(folders) -> dict[int, StateDict]:
    return {version: ldm_weights(folder, version) for version, folder in folders.items()}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("models.finding.OUTPUTS", tmp_path / "output")
    return tmp_path / "output"


@pytest.fixture
def convert(folders):
    """`convert(file)` is the folder that is made of it."""

    def run(file: Path, tokenizer: Path | None = folders[1], allow_pickle: bool = False) -> Path:
        pickles_to = Path("converted") if allow_pickle else None
        return find_model(str(file), "--model", ModelOptions(tokenizer=tokenizer, pickles_to=pickles_to)).path

    return run


@pytest.fixture
def file_of(weights, tmp_path):
    """`file_of(version, change)` is a file of that version's weights and what `change` adds; None removes one."""

    def write(version: int, changes: dict | None = None, metadata: dict | None = None, name: str = "m") -> Path:
        changed = {**weights[version], **(changes or {})}
        changed = {key: weight for key, weight in changed.items() if weight is not None}
        metadata = VELOCITY if version == 2 and metadata is None else metadata
        return write_one_file(tmp_path / f"{name}.safetensors", changed, metadata)

    return write


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


# --- once, and whole or absent --------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_another_content_goes_elsewhere(convert, file_of, folders, tmp_path, capsys):
    first = convert(file_of(1))
    assert "converting" in capsys.readouterr().out and first.name.startswith("m-")
    made = first.stat().st_mtime_ns
    assert convert(file_of(1)) == first and first.stat().st_mtime_ns == made and not capsys.readouterr().out
    other_tokenizer = shutil.copytree(folders[1] / "tokenizer", tmp_path / "other")
    (other_tokenizer / "special_tokens_map.json").write_text("{}")
    middle = {"first_stage_model.encoder.conv_in.bias": torch.ones(32)}  # neither its size nor its ends differ
    several = [first, convert(file_of(1), other_tokenizer), convert(file_of(1, middle))]
    (tmp_path / "m.yaml").write_text("model: {params: {parameterization: v}}")
    assert len({*several, convert(file_of(1))}) == 4


def test_what_fails_half_way_leaves_nothing(convert, file_of, outputs, monkeypatch):
    written = []

    def fail_at_the_vae(state_dict, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(state_dict, path, metadata)

    monkeypatch.setattr("models.one_file.save_file", fail_at_the_vae)
    with pytest.raises(OSError, match="No space"):
        convert(file_of(1))
    assert list((outputs / "converted").iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(convert, file_of, outputs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(WorkError, match="1e-06 GB are free"):
        convert(file_of(1))
    assert not outputs.exists()


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


# --- what it predicts -----------------------------------------------------------------------------------------------

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


def test_a_2_x_model_has_the_size_that_goes_with_what_it_predicts(convert, file_of):
    velocity = convert(file_of(2))
    noise = convert(file_of(2, metadata={"modelspec.prediction_type": "epsilon"}))
    sizes = [json.loads((f / "unet" / "config.json").read_text())["sample_size"] for f in (velocity, noise)]
    assert sizes == [96, 64]


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


@pytest.mark.parametrize("version", [1, 2])
def test_zero_terminal_snr_is_kept_both_ways(convert, tmp_path, version):
    folder = make_model(tmp_path / "model", version, "v_prediction")
    set_zero_snr(folder)
    file = export(folder, tmp_path / "first.safetensors", "fp32")
    converted = convert(file)
    for config in (load_noise_scheduler(f).config for f in (folder, converted)):
        assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
    assert same(load_file(export(converted, tmp_path / "second.safetensors", "fp32")), load_file(file))


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
        (1, {"model.diffusion_model.out.0.bias": torch.zeros(64, dtype=torch.int8)}, "its unet is stored as int8"),
        (1, {"conditioner.embedders.0.x": torch.zeros(1)}, "Stable Diffusion XL"),
        (1, {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": None}, "no text encoder"),
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


def test_a_file_of_something_else_is_refused_with_what_it_is(convert, tmp_path):
    for name, key, complaint in (("lora", "lora_unet_x.lora_down.weight", "--lora"), ("other", "x", "but x")):
        file = write_one_file(tmp_path / f"{name}.safetensors", {key: torch.zeros(1)})
        with pytest.raises(UserError, match=f"{name}.safetensors: .*{complaint}"):
            convert(file)


def test_layers_that_are_not_stable_diffusions_are_refused(convert, tiny_model, tmp_path):
    file = write_one_file(tmp_path / "tiny.safetensors", ldm_weights(tiny_model, 1))
    with pytest.raises(UserError, match=r"8, 16, 4, 8 channels.*a folder in diffusers' format"):
        convert(file)


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


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_a_folder_or_lies_in_one(convert, file_of, folders):
    below, itself = convert(file_of(1), folders[1]), convert(file_of(1), folders[1] / "tokenizer")
    assert below == itself and load_tokenizer(below)("denim jeans") == load_tokenizer(folders[1])("denim jeans")


def test_without_one_and_without_a_hub_a_line_says_how_to_bring_it(convert, file_of, outputs, monkeypatch):
    def unreachable(*args, **settings):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(models.tokenizer_files, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"clip-vit-large.*bash job\.sh setup.*--tokenizer FOLDER") as error:
        convert(file_of(1), tokenizer=None)
    assert "\n" not in str(error.value) and not outputs.exists()


@pytest.mark.parametrize(("version", "padding"), [(1, "<|endoftext|>"), (2, "!")])
def test_from_the_hub_comes_clips_vocabulary_with_each_versions_padding(
    convert, file_of, folders, monkeypatch, version, padding
):
    monkeypatch.setattr(
        models.tokenizer_files, "hf_hub_download", lambda repository, name, cache_dir: folders[1] / "tokenizer" / name
    )
    tokenizer = load_tokenizer(convert(file_of(version), tokenizer=None))
    assert tokenizer.pad_token == padding and tokenizer.model_max_length == 77
    assert tokenizer("denim jeans").input_ids == load_tokenizer(folders[version])("denim jeans").input_ids


def test_a_wrong_tokenizer_is_refused(convert, file_of, folders, tmp_path, outputs):
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path}"):
        convert(file_of(1), tmp_path)
    other = shutil.copytree(folders[1] / "tokenizer", tmp_path / "other")
    for path in other.iterdir():
        if path.name not in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            path.unlink()
    vocabulary = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps({**vocabulary, "jeansjeans</w>": len(vocabulary)}))
    with pytest.raises(UserError, match=rf"has {len(vocabulary) + 1} tokens.*{len(vocabulary)}"):
        convert(file_of(1), other)
    assert not list(outputs.glob("converted/*"))
    with pytest.raises(UserError, match=f"--tokenizer {other}: .*one file"):
        convert(folders[1], other)


def test_the_result_is_a_folder_like_any_other(convert, file_of, weights):
    folder = convert(file_of(1))
    assert torch.equal(load_unet(folder).conv_out.bias, weights[1]["model.diffusion_model.out.2.bias"])
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {
        (folder / "model_index.json").stat().st_mode & 0o777
    }
