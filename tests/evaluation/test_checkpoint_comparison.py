"""inference.py --checkpoint all: the same pictures with every checkpoint of a run, measured and side by side."""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioned_folder import write_captioned_folder
from evaluation.checkpoints import compare_checkpoints
from generated_folder import QUICK, pixels, rows
from generation import image_generator
from generation.generate import generate, missing_images
from inference import parse_args
from planned_image import planned_image
from runtime.errors import UserError

NAMES = ["checkpoint-1", "checkpoint-2", "result"]
KEYS = ["checkpoint", "val_loss", "nearest", "copies", "diversity", "image_fidelity", "prompt_fidelity"]
PROMPTS = ["--prompt", "denim jeans", "--prompt", "a red t shirt", "--num_images", "2"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """A run of the whole UNet with a held-out picture, and one of a LoRA, on a data set of their own."""
    from train_text_to_image import parse_args
    from training.train import train

    where = tmp_path_factory.mktemp("trained")
    data = write_captioned_folder(where / "garments")
    usual = ["--pretrained_model_name_or_path", tiny_model, "--dataset", data, "--max_train_steps", 2]
    usual += ["--checkpointing_steps", 1, "--learning_rate", 0.01]
    for name, flags in {"unet": ["--validation_split", 0.3, "--use_ema"], "lora": ["--lora_rank", 2]}.items():
        train(parse_args([str(word) for word in [*usual, "--output_dir", where / name, *flags]]))
    return {name: where / name for name in ("unet", "lora", "garments")}


@pytest.fixture
def compared(tmp_path):
    """`compared(run, flag, ...)` compares in this process and returns the rows of checkpoints.jsonl."""

    def run(model: Path, *flags: object, prompts: list[str] = PROMPTS) -> list[dict]:
        words = ["--model", model, "--checkpoint", "all", "--output_dir", tmp_path / "out", *QUICK, *prompts, *flags]
        compare_checkpoints(parse_args([str(word) for word in words]))
        return [json.loads(line) for line in (tmp_path / "out" / "checkpoints.jsonl").read_text().splitlines()]

    return run


def test_each_checkpoint_and_the_result_are_generated_measured_and_shown(trained, compared, tmp_path, capsys):
    found, out = compared(trained["unet"]), tmp_path / "out"
    assert [row["checkpoint"] for row in found] == NAMES and all(list(row) == KEYS for row in found)
    for row in found:
        assert all(row[key] > 0 for key in ("val_loss", "nearest", "diversity")) and row["copies"] in range(5)
        assert row["image_fidelity"] is row["prompt_fidelity"] is None
    pictures = rows(out)
    assert [row["checkpoint"] for row in pictures] == [name for name in NAMES for _ in range(4)]
    assert {(row["prompt"], row["seed"]) for row in pictures if row["checkpoint"] == "checkpoint-1"} == {
        (prompt, seed) for prompt in PROMPTS[1:4:2] for seed in (0, 1)
    }
    page = (out / "checkpoints.html").read_text()
    assert all(page.count(f'src="{row["file_name"]}"') == 1 for row in pictures)
    assert Image.open(out / "contact_sheet.jpg").width > 3 * 200
    assert (out / "index.html").read_text().count("<figure") == 12
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"checkpoint-\d|result", last) and "looking is better" in last and "checkpoints.html" in last


def test_a_checkpoints_picture_is_the_one_that_its_name_generates(trained, compared, tmp_path):
    compared(trained["unet"], prompts=["--prompt", "denim jeans", "--num_images", "1"])
    words = ["--model", trained["unet"], "--checkpoint", "checkpoint-1", "--output_dir", tmp_path / "one", *QUICK]
    generate(parse_args([*map(str, words), "--prompt", "denim jeans", "--num_images", "1"]))
    [alone] = rows(tmp_path / "one")
    [same] = [row for row in rows(tmp_path / "out") if row["checkpoint"] == "checkpoint-1"]
    assert alone == same
    assert (pixels(tmp_path / "one" / alone["file_name"]) == pixels(tmp_path / "out" / same["file_name"])).all()


def test_one_unet_is_loaded_after_the_other_and_the_text_encoder_once(trained, compared, monkeypatch):
    loaded = []
    for name in ("load_generation_unet", "load_generation_prompt_encoder", "load_vae"):
        load = getattr(image_generator, name)
        monkeypatch.setattr(image_generator, name, lambda *what, n=name, f=load: loaded.append(n) or f(*what))
    monkeypatch.setattr(image_generator.ImageGenerator, "load_unet", freed_first(image_generator.ImageGenerator))
    compared(trained["unet"], prompts=["--prompt", "denim jeans", "--num_images", "1"])
    assert sorted(loaded) == ["load_generation_prompt_encoder", *["load_generation_unet"] * 3, "load_vae"]
    compared(trained["unet"], "--resume", prompts=["--prompt", "denim jeans", "--num_images", "1"])
    assert len(loaded) == 5  # nothing was missing


def freed_first(generator_class):
    """Its load_unet, which must find no earlier UNet alive when it loads the next one."""
    import gc
    import weakref

    load, earlier = generator_class.load_unet, []

    def load_unet(self, weights):
        original = image_generator.load_generation_unet

        def check(*what):
            gc.collect()
            assert all(unet() is None for unet in earlier)
            return original(*what)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_generator, "load_generation_unet", check)
            load(self, weights)
        earlier.append(weakref.ref(self.unet))

    return load_unet


def test_a_lora_run_is_compared_too_without_held_out_pictures(trained, compared):
    found = compared(trained["lora"], prompts=["--prompt", "denim jeans", "--num_images", "2"])
    assert [row["checkpoint"] for row in found] == NAMES and {row["val_loss"] for row in found} == {None}
    assert len({row["diversity"] for row in found}) > 1


def test_a_picture_of_two_checkpoints_with_the_same_weights_is_generated_once():
    last = [planned_image(seed=seed) for seed in (1, 2)]
    result = [replace(image, checkpoint="result") for image in [*last, planned_image(seed=3)]]
    assert missing_images(Namespace(resume=False), [last, result]) == [last, result[2:]]


def test_a_run_that_is_not_finished_has_its_checkpoints_alone(trained, compared, tmp_path):
    run = shutil.copytree(trained["unet"], tmp_path / "run")
    (run / "model_index.json").unlink()
    found = compared(run, prompts=["--prompt", "denim jeans", "--num_images", "1"])
    assert [row["checkpoint"] for row in found] == NAMES[:2]
    assert {row["diversity"] for row in found} == {None}


def test_without_the_training_pictures_copies_stay_open_and_a_line_says_so(trained, compared, tmp_path, capsys):
    run = shutil.copytree(trained["unet"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "folders": [{"folder": str(tmp_path / "gone")}]}))
    found = compared(run, prompts=["--prompt", "denim jeans", "--num_images", "1"])
    assert {row["nearest"] for row in found} == {row["copies"] for row in found} == {None}
    assert all(row["val_loss"] for row in found)
    assert re.search("not measured: .*gone", capsys.readouterr().out)


@pytest.fixture(scope="module")
def clip(tiny_model, tmp_path_factory) -> Path:
    """A tiny random CLIP with its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("embedder") / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_measures_likeness_to_the_training_pictures_and_to_the_prompt(trained, compared, clip):
    one = ["--prompt", "denim jeans", "--num_images", "1"]
    found = compared(trained["unet"], "--embedder", clip, prompts=one)
    for key in ("image_fidelity", "prompt_fidelity"):
        assert all(-1 <= row[key] <= 1 for row in found) and len({row[key] for row in found}) > 1


def test_the_loaded_texts_features_are_those_of_transformers(clip):
    from transformers import AutoTokenizer, CLIPModel

    from evaluation.similarity import FeatureSimilarity

    texts = ["denim jeans", "the white " * 200]
    found = torch.from_numpy(FeatureSimilarity(str(clip)).text_features(texts))
    tokens = AutoTokenizer.from_pretrained(clip)(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        output = model.text_projection(model.text_model(**tokens).pooler_output)
    assert torch.allclose(found, torch.nn.functional.normalize(output, dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--checkpoint", "all", "--model", "BASE"], "--checkpoint all: --model .* not a training run"),
        (["--checkpoint", "all", "--model", "EMPTY"], "--checkpoint all: .* no complete checkpoint"),
        (["--checkpoint", "all", "--embedder", "nowhere"], "--embedder nowhere: not a vision model"),
        (["--embedder", "x"], "--embedder .* --checkpoint all"),
        (["--embedder", "x", "--checkpoint", "latest"], "--embedder .* --checkpoint all"),
    ],
)
def test_wrong_input_is_refused_by_name_before_anything_is_generated(trained, tiny_model, tmp_path, flags, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text(json.dumps({"base_model": str(tiny_model), "arguments": {}}))
    folders = {"BASE": str(tiny_model), "EMPTY": str(tmp_path / "empty")}
    words = ["--model", str(trained["unet"]), "--prompt", "x", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=named):
        compare_checkpoints(parse_args([*words, *(folders.get(flag, flag) for flag in flags)]))
    assert not (tmp_path / "out").exists()
