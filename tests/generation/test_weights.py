"""Which weights generate is what the flags ask for."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from generation.loras import find_lora
from generation.weights import (
    find_weights,
    load_generation_sampler,
    load_generation_text_encoder,
    load_generation_unet,
    trigger_warning,
)
from models.folders import PARTS, ModelFolder, fingerprint_model
from models.loading import load_text_encoder, load_unet
from models.lora import LORA_FILE
from runs.checkpoints import MANIFEST
from runtime.errors import UserError

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def runs(tiny_model, captioned_folder, tmp_path_factory) -> dict[str, Path]:
    """A run of the whole UNet with EMA, and one of a LoRA, each with two checkpoints."""
    from train_text_to_image import parse_args
    from training.train import train

    where = tmp_path_factory.mktemp("runs")
    usual = ["--pretrained_model_name_or_path", tiny_model, "--dataset", captioned_folder, "--max_train_steps", 2]
    usual += ["--checkpointing_steps", 1, "--learning_rate", 0.01, "--trigger", "sks"]
    for name, flags in {"unet": ["--use_ema"], "lora": ["--lora_rank", 2]}.items():
        train(parse_args([str(word) for word in [*usual, "--output_dir", where / name, *flags]]))
    return {name: where / name for name in ("unet", "lora")}


def state_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return unet.state_dict()


def same(one: dict, other: dict, tolerance: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=tolerance) for k in one)


def unet_of(*asked, **more) -> dict[str, torch.Tensor]:
    return state_of(load_generation_unet(find_weights(*map(str, asked), **more), torch.float32))


def test_a_checkpoint_has_its_ema_weights_unless_the_others_are_asked_for(runs):
    own = runs["unet"] / "checkpoint-2"
    ema, plain = (state_of(UNet2DConditionModel.from_pretrained(own / part)) for part in ("unet_ema", "unet"))
    assert not same(ema, plain)
    assert same(unet_of(runs["unet"], "checkpoint-2"), ema)
    assert same(unet_of(runs["unet"], "checkpoint-2/unet"), plain)


def test_the_latest_checkpoint_of_an_unfinished_run_is_used_with_its_base(runs, tiny_model, tmp_path):
    folder = shutil.copytree(runs["unet"], tmp_path / "run")
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="--checkpoint latest"):
        find_weights(str(folder))
    latest = find_weights(str(folder), "latest")
    assert (latest.base.path, latest.unet) == (tiny_model, folder / "checkpoint-2" / "unet_ema")
    assert "checkpoint-2/unet_ema" in latest.describe()
    assert same(unet_of(folder, "latest"), state_of(load_unet(folder / "checkpoint-2", subfolder="unet_ema")))
    (folder / "checkpoint-2" / MANIFEST).unlink()  # half-written
    assert find_weights(str(folder), "latest").unet == folder / "checkpoint-1" / "unet_ema"


def test_a_lora_has_the_strength_that_is_asked_for(runs, tiny_model):
    base = state_of(load_unet(tiny_model))
    whole, half, none = (unet_of(runs["lora"], lora_scales=[scale]) for scale in (1.0, 0.5, 0.0))
    assert same(none, base) and not same(whole, base, 1e-4)
    assert same(half, {name: (base[name] + whole[name]) / 2 for name in base}, 1e-5)
    assert same(unet_of(tiny_model, loras=[str(runs["lora"])]), whole)
    assert same(unet_of(tiny_model, loras=[str(runs["lora"] / LORA_FILE)]), whole)
    checkpoint = find_weights(str(runs["lora"]), "latest")
    assert checkpoint.loras == ((runs["lora"] / "checkpoint-2" / LORA_FILE, 1.0),)


def test_a_lora_is_used_with_the_unet_that_it_was_trained_on(runs, tiny_model, tmp_path, monkeypatch):
    """--non_ema_revision takes the UNet from another revision than the rest."""
    other = shutil.copytree(tiny_model, tmp_path / "other revision")
    monkeypatch.setattr("generation.weights.find_bases", lambda args: (ModelFolder(tiny_model), ModelFolder(other)))
    found = find_weights(str(runs["lora"]))
    assert (found.base.path, found.unet) == (tiny_model, other / "unet") and "other revision" in found.describe()


@pytest.fixture
def changed_run(runs, tmp_path):
    """`changed_run(kind, name, facts, arguments)`: a copy of a run with other facts in its run.json."""

    def change(kind: str, name: str, facts: dict | None = None, arguments: dict | None = None) -> Path:
        folder = shutil.copytree(runs[kind], tmp_path / name)
        run = json.loads((folder / "run.json").read_text())
        run["arguments"] |= arguments or {}
        (folder / "run.json").write_text(json.dumps(run | (facts or {})))
        return folder

    return change


@pytest.mark.parametrize("gone", ["folder", "file.safetensors"])
def test_a_base_that_is_gone_is_named_with_the_way_to_name_it_anew(changed_run, tiny_model, tmp_path, gone):
    lora = changed_run("lora", "run", {"base_model": str(tmp_path / gone)})
    for checkpoint, named in ((None, lora), ("checkpoint-1", lora / "checkpoint-1")):
        with pytest.raises(UserError, match=f"{tmp_path / gone}.*--model BASE --lora {named}$"):
            find_weights(str(lora), checkpoint)
    assert find_weights(str(tiny_model), loras=[str(lora)]).run["trigger"] == "sks"
    whole = changed_run("unet", "whole", {"base_model": str(tmp_path / gone)})
    (whole / "model_index.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / gone}") as caught:
        find_weights(str(whole), "latest")
    assert "--lora" not in str(caught.value)


def test_a_tokenizer_that_is_gone_is_named(changed_run, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"")
    facts, arguments = {"base_model": str(tmp_path / "base.safetensors")}, {"tokenizer": str(tmp_path / "words")}
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path / 'words'}"):
        find_weights(str(changed_run("lora", "run", facts, arguments)))


def test_a_base_that_is_no_longer_usable_is_named_with_the_way_to_name_another(changed_run, tmp_path):
    (tmp_path / "spoiled").mkdir()
    folder = changed_run("lora", "run", {"base_model": str(tmp_path / "spoiled")})
    with pytest.raises(UserError, match=f"{tmp_path / 'spoiled'}.*--model BASE --lora {folder}$"):
        find_weights(str(folder))


VELOCITY = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("first", "second"), [({}, VELOCITY), (VELOCITY, {**VELOCITY, "rescale_betas_zero_snr": True})]
)
def test_two_loras_on_different_noise_schedules_are_refused(changed_run, tiny_model, first, second):
    one, two = changed_run("lora", "one", arguments=first), changed_run("lora", "two", arguments=second)
    for model, loras in ((tiny_model, [one, two]), (one, [two])):
        with pytest.raises(UserError, match=f"{one.name}/.* was trained for .*{two.name}/.* for v_prediction"):
            find_weights(str(model), loras=[str(lora) for lora in loras])
    same = find_weights(str(tiny_model), loras=[str(two), str(two / "checkpoint-1")])
    assert load_generation_sampler(same, "ddim").config.prediction_type == "v_prediction"


def test_a_lora_on_another_noise_schedule_than_the_models_is_said(changed_run, runs, tiny_model):
    lora = changed_run("lora", "velocity", arguments=VELOCITY)
    for model in (tiny_model, runs["unet"]):
        note = find_weights(str(model), loras=[str(lora)]).schedule_note
        assert "velocity/" in note and "v_prediction" in note and "epsilon" in note
    assert find_weights(str(lora)).schedule_note is None
    assert find_weights(str(tiny_model), loras=[str(runs["lora"])]).schedule_note is None


def test_a_loras_own_base_says_its_noise_schedule_where_the_run_does_not(changed_run, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "velocity base")
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | VELOCITY))
    lora = changed_run("lora", "run", {"base_model": str(base)})
    assert "v_prediction" in find_weights(str(tiny_model), loras=[str(lora)]).schedule_note
    assert find_weights(str(lora)).schedule_note is None


def test_what_a_file_says_of_its_training_counts_too(runs, tiny_model, tmp_path):
    """As kohya's scripts and export_checkpoint.py write it."""
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.zeros(2, 16), f"unet.{LAYER}.lora_B.weight": torch.zeros(16, 2)}
    metadata = {"modelspec.prediction_type": "v", "modelspec.trigger_phrase": "zwx coat"}
    save_file(tensors, tmp_path / "style.safetensors", metadata)
    found = find_weights(str(tiny_model), loras=[str(tmp_path / "style.safetensors")])
    assert "v_prediction" in found.schedule_note and found.triggers == ("zwx coat",)
    assert load_generation_sampler(found, "ddim").config.prediction_type == "epsilon"  # as the model says
    with pytest.raises(UserError, match="style.safetensors was trained for v_prediction"):
        find_weights(str(tiny_model), loras=[str(tmp_path / "style.safetensors"), str(runs["lora"])])


def test_a_peft_adapter_of_the_hub_is_found(monkeypatch, tmp_path):
    def download(name: str, file: str) -> str:
        if file == LORA_FILE:
            raise EntryNotFoundError("no such file")
        return str(tmp_path / file)

    monkeypatch.setattr("generation.loras.hf_hub_download", download)
    assert find_lora("someone/adapter") == tmp_path / "adapter_model.safetensors"


def test_the_trigger_phrases_of_all_loras_are_asked_for(changed_run, runs, tiny_model):
    other = changed_run("lora", "other", {"trigger": "zwx coat"})
    for model, loras in ((tiny_model, [runs["lora"], other]), (runs["lora"], [other])):
        found = find_weights(str(model), loras=[str(lora) for lora in loras])
        assert found.triggers == ("sks", "zwx coat")
        said = trigger_warning(found, ["SKS jeans", "a ZWX coat"]).splitlines()
        assert ["sks" in said[0], "zwx coat" in said[1]] == [True, True] and "1 of 2" in said[0]
        assert trigger_warning(found, ["sks jeans, zwx coat"]) is None


def test_loras_add_up_each_with_its_own_scale(runs, tiny_model):
    base, one = state_of(load_unet(tiny_model)), unet_of(runs["lora"])
    early = unet_of(tiny_model, loras=[str(runs["lora"] / "checkpoint-1")])

    def added(late_scale: float, early_scale: float) -> dict[str, torch.Tensor]:
        both = {name: (one[name] - base[name], early[name] - base[name]) for name in base}
        return {name: base[name] + late_scale * late + early_scale * soon for name, (late, soon) in both.items()}

    named = [str(runs["lora"]), str(runs["lora"] / "checkpoint-1")]
    described = find_weights(str(tiny_model), loras=named, lora_scales=[0.25, 1.0]).describe()
    assert described.endswith(f"{LORA_FILE} at 0.25 and the LoRA {named[1]}/{LORA_FILE}")
    assert not same(one, early, 1e-4)
    assert same(unet_of(tiny_model, loras=named), added(1, 1), 1e-5)
    assert same(unet_of(tiny_model, loras=named, lora_scales=[0.25, 2.0]), added(0.25, 2.0), 1e-5)
    own = {"loras": named[1:]}  # the run's own LoRA comes first, its scale may be left out
    assert same(unet_of(runs["lora"], **own, lora_scales=[0.5]), added(1, 0.5), 1e-5)
    assert same(unet_of(runs["lora"], **own, lora_scales=[0.5, 2.0]), added(0.5, 2.0), 1e-5)


def test_pictures_with_one_lora_keep_their_names(runs, tiny_model):
    """The fingerprint enters the file names, the recorded name stands in images.jsonl."""
    file = runs["lora"] / LORA_FILE
    found = find_weights(str(tiny_model), loras=[str(file)], lora_scales=[0.5])
    parts = [part for part in PARTS if part != "unet"]
    facts = f"{fingerprint_model(found.base, parts)} {fingerprint_model(found.base, ['unet'])}"
    facts += f" {hashlib.sha256(file.read_bytes()).hexdigest()} 0.5"
    assert found.fingerprint() == hashlib.sha256(facts.encode()).hexdigest()
    assert found.recorded_name == f"{tiny_model} + lora/{LORA_FILE} at 0.5"
    assert found.describe() == f"{tiny_model} with the LoRA {file} at 0.5"


def test_a_lora_in_kohyas_format_is_read_with_its_alpha(tiny_model, tmp_path):
    base = state_of(load_unet(tiny_model))
    shape = base[f"{LAYER}.weight"].shape
    torch.manual_seed(0)
    down, up = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    name = "lora_unet_" + LAYER.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "style.safetensors")
    changed = unet_of(tiny_model, loras=[str(tmp_path / "style.safetensors")])
    assert torch.allclose(changed[f"{LAYER}.weight"], base[f"{LAYER}.weight"] + up @ down / 2, atol=1e-5)
    assert same({**changed, f"{LAYER}.weight": base[f"{LAYER}.weight"]}, base)


def test_a_loras_weights_for_the_text_encoder_are_used(tiny_model, tmp_path):
    torch.manual_seed(0)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)}
    save_file(tensors, tmp_path / LORA_FILE)
    tokens = torch.tensor([[1, 2, 3]])
    plain, changed, none = (
        load_generation_text_encoder(find_weights(str(tiny_model), loras=loras, lora_scales=scales))(tokens)[0]
        for loras, scales in (([], []), ([str(tmp_path)], [1.0]), ([str(tmp_path)], [0.0]))
    )
    assert not torch.allclose(plain, changed, atol=1e-4)
    assert torch.allclose(plain, load_text_encoder(tiny_model)(tokens)[0]) and torch.allclose(plain, none, atol=1e-6)


def test_several_loras_change_the_text_encoder_together(tiny_model, tmp_path):
    """In kohya's names, with an alpha of half the rank."""
    base = load_text_encoder(tiny_model).state_dict()
    expected = dict(base)
    for number, scale in enumerate((1.0, 0.5)):
        torch.manual_seed(number)
        tensors = {}
        for layer in ("q_proj", "out_proj"):
            down, up = torch.randn(2, 16), torch.randn(16, 2)
            name = f"lora_te_text_model_encoder_layers_0_self_attn_{layer}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
            [key] = [key for key in base if key.endswith(f"layers.0.self_attn.{layer}.weight")]
            expected[key] = expected[key] + scale * up @ down / 2
        save_file(tensors, tmp_path / f"{number}.safetensors")
    loras = [str(tmp_path / f"{number}.safetensors") for number in range(2)]
    weights = find_weights(str(tiny_model), loras=loras, lora_scales=[1.0, 0.5])
    changed = load_generation_text_encoder(weights).state_dict()
    assert same(changed, expected, 1e-5)
    assert same(state_of(load_generation_unet(weights, torch.float32)), state_of(load_unet(tiny_model)))


def test_other_weights_have_another_fingerprint(runs, tiny_model):
    checkpoints = ("checkpoint-1", "checkpoint-2", "checkpoint-2/unet")
    several = [find_weights(str(tiny_model)), find_weights(str(runs["unet"]))]
    several += [find_weights(str(runs["unet"]), name) for name in checkpoints]
    several += [find_weights(str(runs["lora"]), lora_scales=[scale]) for scale in (0.5, 1.0)]
    assert len({weights.fingerprint() for weights in several}) == len(several)
    assert find_weights(str(tiny_model)).fingerprint() == several[0].fingerprint()


def test_a_base_is_sampled_on_the_schedule_that_was_trained(runs, tmp_path):
    folder = shutil.copytree(runs["lora"], tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["arguments"] |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "run.json").write_text(json.dumps(run))
    config = load_generation_sampler(find_weights(str(folder)), "ddim").config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    with pytest.raises(UserError, match="--scheduler pndm.*ddim"):
        load_generation_sampler(find_weights(str(folder)), "pndm")


def test_prompts_without_the_trigger_phrase_are_counted(runs, tiny_model):
    triggered, base = find_weights(str(runs["unet"])), find_weights(str(tiny_model))
    assert "1 of 2" in trigger_warning(triggered, ["SKS, denim jeans", "jeans"])
    assert trigger_warning(triggered, ["sks, jeans"]) is None and trigger_warning(base, ["x"]) is None


@pytest.mark.parametrize(
    ("checkpoint", "loras", "scales", "complaint"),
    [
        ("checkpoint-9", [], [], "checkpoint-9: .*checkpoint-1, checkpoint-2"),
        ("../unet", [], [], "--checkpoint"),
        ("checkpoint-1/vae", [], [], "vae.*unet, unet_ema"),
        (None, ["no/such-lora"], [], "--lora no/such-lora"),
        (None, [], [0.5], "--lora_scale 0.5"),
        (None, ["LORA", "LORA"], [0.5], "--lora_scale is given 1 times, --lora 2 times"),
        (None, ["LORA"], [0.5, 1.0], "--lora_scale is given 2 times, --lora 1 times"),
    ],
)
def test_missing_weights_are_refused_by_name(runs, monkeypatch, checkpoint, loras, scales, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loras = [lora.replace("LORA", str(runs["lora"])) for lora in loras]
    with pytest.raises(UserError, match=complaint):
        find_weights(str(runs["unet"]), checkpoint, loras, scales)


def test_a_checkpoint_needs_a_run_and_a_lora_its_base(runs, tiny_model, tmp_path):
    with pytest.raises(UserError, match=str(tiny_model)):
        find_weights(str(tiny_model), "latest")
    (tmp_path / LORA_FILE).write_bytes((runs["lora"] / LORA_FILE).read_bytes())
    with pytest.raises(UserError, match=f"--lora {tmp_path}"):
        find_weights(str(tmp_path))
    (tmp_path / "other.safetensors").write_bytes(b"\0" * 8)
    with pytest.raises(UserError, match="other.safetensors"):
        load_generation_unet(find_weights(str(tiny_model), loras=[str(tmp_path / "other.safetensors")]), torch.float32)


def test_a_lora_of_another_kind_of_model_is_refused(tiny_model, tmp_path):
    save_file({"transformer.blocks.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match="flux.safetensors"):
        load_generation_unet(find_weights(str(tiny_model), loras=[str(tmp_path / "flux.safetensors")]), torch.float32)


def test_a_lora_of_another_base_is_refused_with_the_counts_before_anything_is_loaded(tiny_model, tmp_path):
    """Though most of its layers have a place: diffusers would take those alone."""
    tensors = {}
    for layer in ("unet.mid_block.nowhere", "unet." + LAYER, "text_encoder.text_model.encoder.layers.0.mlp.fc1"):
        out = 32 if "mlp" in layer else 16
        tensors |= {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(out, 2)}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors: for another base: 2 of 3 layers .*mid_block.nowhere"):
        find_weights(str(tiny_model), loras=[str(tmp_path / "other.safetensors")])


def test_a_loras_run_counts_whatever_base_is_named(runs, tiny_model):
    found = find_weights(str(tiny_model), loras=[str(runs["lora"] / "checkpoint-2")])
    assert found.run["trigger"] == "sks" and trigger_warning(found, ["jeans"])
    assert found.scheduler_overrides == found.run["arguments"]
