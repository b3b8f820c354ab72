"""The starter captioner is an ordinary BLIP that describes renders; its pre-training continues after a stop."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import BlipForConditionalGeneration, BlipProcessor

import pretrain_captioner
from background import run_script
from captioner_pictures import load_pool, sample_batch
from captioner_words import ATTRIBUTES, caption_text, make_tokenizer, read_caption
from clone import ROOT
from make_dataset import PICTURES
from measure_captioner import captions_of, check_caption, held_out_specs, render_all
from render_garments import sample_spec

FOLDER = ROOT / "text_to_image" / "starter" / "captioner"
SCRIPT = ROOT / "text_to_image" / "starter" / "pretrain_captioner.py"


@pytest.fixture(scope="module")
def captioner():
    model = BlipForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32, use_safetensors=True)
    return model.eval(), BlipProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def dataset():
    return [Image.open(ROOT / "dataset" / name) for name in PICTURES]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Pre-trained for two steps on a few renders."""
    folder = tmp_path_factory.mktemp("captioner")
    pretrain(folder, 2)
    return folder


def pretrain(folder, steps: int) -> None:
    flags = ["--work", folder, "--to", folder / "made", "--pictures", 24, "--jeans", 8, "--steps", steps]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-2000:]


# --- captions -------------------------------------------------------------------------------------------------------


def test_it_is_a_small_folder_in_fp16_with_the_files_of_its_processor():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 15e6
    assert {"config.json", "README.md", "LICENSE"} <= set(files)
    assert {"tokenizer.json", "vocab.txt", "processor_config.json", "preprocessor_config.json"} <= set(files)
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_it_is_right_about_the_data_sets_pictures(captioner, dataset):
    for (spec, _), caption in zip(PICTURES.values(), captions_of(*captioner, dataset), strict=True):
        assert "denim jeans" in caption and all(check_caption(spec, caption).values()), caption


@pytest.mark.slow
def test_it_is_right_about_unseen_renders(captioner):
    specs, sizes = held_out_specs(45)
    captions = captions_of(*captioner, render_all(specs, sizes))
    found = [check_caption(spec, caption) for spec, caption in zip(specs, captions, strict=True)]
    for name in (*ATTRIBUTES, "corner"):
        right = [f[name] for f in found if name in f]
        assert sum(right) >= 0.9 * len(right), (name, captions)


def test_captions_are_the_same_in_half_precision_and_one_by_one(captioner, dataset):
    model, processor = captioner
    half = BlipForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float16, use_safetensors=True).eval()
    inputs = processor(images=dataset, return_tensors="pt")
    tokens = half.generate(**inputs, max_new_tokens=60, num_beams=1, do_sample=False)
    together = captions_of(model, processor, dataset)
    assert [t.strip() for t in processor.batch_decode(tokens, skip_special_tokens=True)] == together
    assert captions_of(model, processor, dataset, batch=1) == together


def test_after_a_prompt_it_continues_with_the_caption(captioner, dataset):
    model, processor = captioner
    inputs = processor(images=dataset[:1], text=["a photograph of"], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, num_beams=1, do_sample=False)
    text = processor.decode(tokens[0], skip_special_tokens=True)
    rest = text.removeprefix("a photograph of ")
    assert rest != text and read_caption("A" + rest[1:])["kind"] == "jeans"


# --- words ----------------------------------------------------------------------------------------------------------


def test_every_caption_survives_the_tokenizer_and_is_parsed_back_into_its_spec():
    tokenizer = make_tokenizer()
    for i in range(300):
        spec = sample_spec(i, "jeans" if i % 9 == 8 else None)
        ids = tokenizer(caption_text(spec)).input_ids
        assert len(ids) - 1 <= 60 and tokenizer.unk_token_id not in ids
        named = read_caption(tokenizer.decode(ids, skip_special_tokens=True))
        assert all(named[k] == (None if k == "view" and spec.fold == "half" else getattr(spec, k)) for k in ATTRIBUTES)


@pytest.mark.parametrize(
    "change",
    [
        ("back.", "back"),
        ("blue", "bluish"),
        ("seen from the back", "seen from the front"),
        ("pair of", ""),
        ("Two", "2"),
    ],
)
def test_a_caption_that_differs_in_a_word_is_not_parsed(change):
    spec = next(s for i in range(50) if (s := sample_spec(i, "jeans")).view == "back" and s.marker is None)
    text = caption_text(spec)
    assert read_caption(text) and text != text.replace(*change) and read_caption(text.replace(*change)) is None


def test_other_words_are_spelt_and_the_start_token_is_not_decoded():
    tokenizer = BlipProcessor.from_pretrained(FOLDER).tokenizer
    text = "Ohwx's café-style t-shirt (XL), 100% cotton!"
    ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    assert tokenizer.bos_token == "[DEC]" and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "").replace("é", "e")


# --- pre-training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pretraining_renders_trains_and_saves_a_captioner_that_generates(work):
    model = BlipForConditionalGeneration.from_pretrained(work / "made", use_safetensors=True)
    assert sum(path.stat().st_size for path in (work / "made").iterdir()) <= 15e6
    tokens = model.generate(torch.zeros(1, 3, 160, 160), max_new_tokens=5)
    assert tokens[0, 0] == BlipProcessor.from_pretrained(work / "made").tokenizer.bos_token_id


@pytest.mark.slow
def test_started_again_it_neither_renders_nor_trains_what_is_done(work):
    before = {path: path.stat().st_mtime_ns for path in (*work.glob("*.npy"), work / "captioner.pt")}
    pretrain(work, 2)
    assert len(before) == 10 and all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.slow
def test_a_stopped_pretraining_ends_with_the_same_weights(work, tmp_path, monkeypatch):
    pool = load_pool(work, work, pretrain_captioner.make_processor().image_processor, 8)
    (tmp_path / "whole").mkdir()
    whole = pretrain_captioner.train(pool, tmp_path / "whole", 3, "cpu").state_dict()

    class StopsAfterTwo(pretrain_captioner.StageCheckpoint):
        def due(self) -> bool:
            return True

        def save(self, state: dict) -> None:
            super().save(state)
            if state["step"] == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain_captioner, "StageCheckpoint", StopsAfterTwo)
        pretrain_captioner.train(pool, tmp_path, 3, "cpu")
    resumed = pretrain_captioner.train(pool, tmp_path, 3, "cpu").state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_both_pictures_of_a_pair_are_augmented_alike(work):
    pool = load_pool(work, work, pretrain_captioner.make_processor().image_processor, 8)
    batch = sample_batch(pool, 2, 4, np.random.default_rng(0))
    fronts, backs = batch.specs[2:6], batch.specs[6:]
    assert {s.view for s in fronts} == {"front"} and {s.view for s in backs} == {"back"}
    assert [(s.kind, s.seed, s.marker) for s in fronts] == [(s.kind, s.seed, s.marker) for s in backs]
    assert all(0 < difference.mean() < 0.1 for difference in batch.differences)
    assert fronts[-1].kind == "jeans"
