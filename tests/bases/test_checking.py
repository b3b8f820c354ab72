"""A model that cannot be loaded, run or saved is refused before anything is computed, with the name of the fault."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from bases.checking import check_model
from bases.finding import find_model
from models.folders import ModelFolder, has_safety_checker, kept_extras, left_out_extras
from runtime.errors import UserError
from runtime.paths import STARTER
from tiny_model import add_safety_checker


@pytest.fixture
def checked_model(own_model) -> Path:
    """With a safety checker and a feature extractor."""
    add_safety_checker(own_model)
    return own_model


def weights_file(model: Path, part: str) -> Path:
    [file] = (model / part).glob("*.safetensors")
    return file


def change_weights(model: Path, part: str, change) -> None:
    file = weights_file(model, part)
    save_file(change(load_file(file)), file, {"format": "pt"})


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_whole_model_passes(checked_model):
    check_model(checked_model)
    check_model(ModelFolder(checked_model, "fp16"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
def test_a_missing_weight_is_named(checked_model, part):
    name = min(load_file(weights_file(checked_model, part)))
    change_weights(checked_model, part, lambda weights: {key: weights[key] for key in weights if key != name})
    with pytest.raises(UserError, match=rf"{part}/.*missing: {re.escape(name)}"):
        check_model(checked_model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: {**weights, "extra.weight": torch.zeros(1)}, "not ask for: extra.weight"),
        (lambda weights: {**weights, "conv_in.bias": torch.zeros(3)}, r"sizes .*: conv_in.bias \(3,\)"),
        (lambda weights: {**weights, "conv_in.bias": weights["conv_in.bias"].int()}, "conv_in.bias as I32"),
    ],
    ids=["unexpected", "misshapen", "of integers"],
)
def test_a_weight_that_does_not_belong_is_named(own_model, change, said):
    change_weights(own_model, "unet", change)
    with pytest.raises(UserError, match=f"unet/diffusion_pytorch_model.safetensors: .*{said}"):
        check_model(own_model)


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["new", "old"])
def test_both_layouts_of_clips_keys_count_as_whole(own_model, prefix):
    ids = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}

    def rename(weights):
        return ids | {prefix + name.removeprefix("text_model."): weight for name, weight in weights.items()}

    change_weights(own_model, "text_encoder", rename)
    check_model(own_model)


@pytest.mark.parametrize("prefix", ["", "vision_model."], ids=["new", "old"])
def test_both_layouts_of_the_safety_checkers_keys_count_as_whole(checked_model, prefix):
    def rename(weights):
        return {re.sub(r"^(vision_model\.)+", f"{prefix}vision_model.", name): weights[name] for name in weights}

    change_weights(checked_model, "safety_checker", rename)
    check_model(checked_model)


def test_the_old_names_of_the_vaes_attention_count_as_whole(own_model):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        return {
            re.sub(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: old[m[1]], name): weight
            for name, weight in weights.items()
        }

    change_weights(own_model, "vae", rename)
    assert any(".proj_attn." in name for name in load_file(weights_file(own_model, "vae")))
    check_model(own_model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
@pytest.mark.parametrize("damage", [b"", b"version https://git-lfs.github.com/spec/v1", None])
def test_a_file_that_is_not_whole_is_named(checked_model, part, damage):
    file = weights_file(checked_model, part)
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    with pytest.raises(UserError, match=f"{part} .*{file.name}"):
        check_model(checked_model)


def test_a_file_under_a_name_that_is_not_read_is_missed(own_model):
    weights_file(own_model, "vae").rename(own_model / "vae" / "my.safetensors")
    with pytest.raises(UserError, match="vae .*no file diffusion_pytorch_model.safetensors"):
        check_model(own_model)


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(own_model):
    file = weights_file(own_model, "unet")
    weights, shards = (
        load_file(file),
        ("diffusion_pytorch_model-1.safetensors", "diffusion_pytorch_model-2.safetensors"),
    )
    file.unlink()
    for number, shard in enumerate(shards):
        save_file(dict(sorted(weights.items())[number::2]), own_model / "unet" / shard)
    places = {name: shards[number % 2] for number, name in enumerate(sorted(weights))}
    index = own_model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    check_model(own_model)
    (own_model / "unet" / shards[1]).unlink()
    with pytest.raises(UserError, match=f"unet .*{shards[1]}"):
        check_model(own_model)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("text_encoder", ["transformers", "BertModel"]),
        ("tokenizer", ["transformers", "BertTokenizer"]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("unet", None),
        ("unet", "UNet2DConditionModel"),
        ("scheduler", ["diffusers", None]),
        ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ("scheduler", ["diffusers", "NoSuchScheduler"]),
    ],
)
def test_a_part_of_a_class_that_is_not_used_is_refused_by_name(own_model, part, value):
    change_json(own_model / "model_index.json", **{part: value})
    with pytest.raises(UserError, match=part):
        check_model(own_model)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"norm_eps": "text"}),
        ("unet/config.json", {"out_channels": 8}),
        ("unet/config.json", {"_diffusers_version": "0."}),
        ("vae/config.json", {"scaling_factor": None}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": -0.18}),
        ("vae/config.json", {"scaling_factor": float("nan")}),
        ("vae/config.json", {"scaling_factor": 1e-300}),
        ("vae/config.json", {"block_out_channels": None}),
        ("text_encoder/config.json", {"model_type": {}}),
        ("text_encoder/config.json", {"hidden_act": "no such"}),
        ("scheduler/scheduler_config.json", {"beta_end": -1}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.5}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no such"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilo"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 2}),
    ],
)
def test_a_config_that_nothing_can_be_computed_with_is_refused_with_its_part(own_model, file, changes):
    change_json(own_model / file, **changes)
    with pytest.raises(UserError, match=file.split("/")[0]):
        check_model(own_model)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("safety_checker/config.json", {"projection_dim": "text"}),
        ("feature_extractor/preprocessor_config.json", {"image_mean": None}),
        ("feature_extractor/preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}}),
    ],
)
def test_a_safety_checker_that_cannot_look_at_a_picture_is_refused(checked_model, file, changes):
    change_json(checked_model / file, **changes)
    with pytest.raises(UserError, match=file.split("/")[0]):
        check_model(checked_model)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", ["", "3", "[]"])
def test_a_file_that_holds_no_json_object_is_named(own_model, file, content):
    (own_model / file).write_text(content)
    with pytest.raises(UserError, match=file):
        check_model(own_model)


def test_a_change_of_a_model_that_passed_is_seen(own_model):
    check_model(own_model)
    weights_file(own_model, "unet").unlink()
    with pytest.raises(UserError, match="unet"):
        check_model(own_model)


def test_a_text_encoder_of_another_width_than_the_unet_reads_is_refused(own_model):
    config = CLIPTextConfig.from_pretrained(own_model / "text_encoder")
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(own_model / "text_encoder")
    with pytest.raises(UserError, match=r"text_encoder .*\(1, 77, 32\).*\(1, 77, 16\)"):
        check_model(own_model)


@pytest.mark.parametrize("change", ["removed", "added", "twice"])
def test_a_vocabulary_that_is_not_the_text_encoders_is_refused(own_model, change):
    (own_model / "tokenizer" / "tokenizer.json").unlink()
    vocabulary = own_model / "tokenizer" / "vocab.json"
    words = json.loads(vocabulary.read_text())
    token = next(word for word, number in words.items() if number == 7)
    changed = {"removed": {}, "added": {token: 7, "new": len(words)}, "twice": {token: 8}}[change]
    vocabulary.write_text(json.dumps({word: words[word] for word in words if word != token} | changed))
    with pytest.raises(UserError, match="tokenizer"):
        check_model(own_model)


@pytest.mark.parametrize("left", [1, 20])
def test_a_file_of_merges_that_was_cut_short_is_refused(own_model, left):
    (own_model / "tokenizer" / "tokenizer.json").unlink()
    merges = own_model / "tokenizer" / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:left]))
    with pytest.raises(UserError, match="tokenizer .*merges"):
        check_model(own_model)


def test_the_starters_tokenizer_passes_as_it_is_stored():
    check_model(STARTER)


def test_a_text_encoder_may_have_more_embeddings_than_there_are_tokens(own_model):
    config = CLIPTextConfig.from_pretrained(own_model / "text_encoder")
    config.vocab_size += 55
    CLIPTextModel(config).save_pretrained(own_model / "text_encoder")
    check_model(own_model)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_every_schedule_that_is_trained_passes(own_model, prediction_type, zero_snr):
    changes = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    change_json(own_model / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    change_json(own_model / "scheduler" / "scheduler_config.json", **changes)
    check_model(own_model)


# --- Stable Diffusion XL --------------------------------------------------------------------------------------------


def test_a_whole_xl_passes(xl_model):
    assert find_model(str(xl_model), "--model").path == xl_model


def spoil(model: Path, fault: str) -> None:
    if fault == "no text_encoder_2":
        shutil.rmtree(model / "text_encoder_2")
    elif fault == "other tokens":
        tokenizer = json.loads((model / "tokenizer_2" / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["denim</w>"], words["jeans</w>"] = words["jeans</w>"], words["denim</w>"]
        (model / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(tokenizer))
        (model / "tokenizer_2" / "vocab.json").write_text(json.dumps(words))
    elif fault == "pooled":
        change_json(model / "unet" / "config.json", addition_time_embed_dim=30)
    elif fault == "class":
        change_json(model / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    elif fault == "missing":
        change_weights(
            model, "text_encoder_2", lambda weights: {k: w for k, w in weights.items() if "projection" not in k}
        )
    elif fault == "refiner":
        change_json(model / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
        shutil.rmtree(model / "text_encoder")
        shutil.rmtree(model / "tokenizer")
    elif fault == "inpainting":
        change_json(model / "unet" / "config.json", in_channels=9)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no text_encoder_2", "text_encoder_2"),
        ("other tokens", "tokenizer_2 has other tokens"),
        ("pooled", "text_encoder_2 .*the other parts need"),
        ("class", "CLIPTextModel as its text_encoder_2, where CLIPTextModelWithProjection"),
        ("missing", "text_encoder_2/.*missing: text_projection.weight"),
        ("refiner", "refiner"),
        ("inpainting", "inpainting"),
    ],
)
def test_what_is_no_whole_xl_is_refused_by_name(own_xl_model, fault, said):
    spoil(own_xl_model, fault)
    with pytest.raises(UserError, match=said):
        find_model(str(own_xl_model), "--model")


# --- what a model can do without ------------------------------------------------------------------------------------


def test_a_safety_checker_that_is_whole_is_kept(checked_model):
    assert has_safety_checker(checked_model) and left_out_extras(checked_model) == []
    assert kept_extras(checked_model) == ["safety_checker", "feature_extractor"]


@pytest.mark.parametrize(
    ("gone", "left_out"),
    [
        ("safety_checker/model.safetensors", ["safety_checker"]),
        ("safety_checker/config.json", ["safety_checker"]),
        ("feature_extractor/preprocessor_config.json", ["feature_extractor", "safety_checker"]),
    ],
)
def test_a_safety_checker_that_is_missing_is_no_reason_to_refuse(checked_model, gone, left_out):
    (checked_model / gone).unlink()
    check_model(checked_model)
    assert not has_safety_checker(checked_model) and left_out_extras(checked_model) == left_out


@pytest.mark.parametrize("unnamed", ["safety_checker", "feature_extractor"])
def test_a_safety_checker_that_the_model_does_not_name_may_be_broken(checked_model, unnamed):
    """Neither diffusers nor a result reads it, and no picture is shown to it."""
    change_json(checked_model / "model_index.json", **{unnamed: [None, None]})
    weights_file(checked_model, "safety_checker").write_bytes(b"cut")
    check_model(checked_model)
    assert not has_safety_checker(checked_model) and "safety_checker" not in kept_extras(checked_model)
