"""img_captioning.py end to end with a BLIP of a few thousand random weights: what it writes, keeps and refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from captioning import describe, load_captioner
from captions import append_captions, read_captions
from errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "text_to_image" / "img_captioning.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "blue", "jeans", "a", "photograph", "of"]


def make_captioner(folder: Path, favourite: str) -> Path:
    """A BLIP folder whose model says nothing but `favourite`, whatever the picture."""
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "words.txt"), bos_token="[DEC]")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**size, **tokens, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    vision = {**size, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[WORDS.index(favourite)] += 100
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return make_captioner(tmp_path_factory.mktemp("models") / "says blue", "blue")


@pytest.fixture
def pictures(tmp_path):
    for number in range(1, 4):
        Image.new("RGB", (40, 60), (10, 20, 60 * number)).save(tmp_path / f"11 ({number}).JPG")
    return tmp_path


def run(*flags: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def test_pictures_without_a_row_get_one_and_rows_stay_byte_for_byte(pictures, captioner):
    before = b'{ "file_name":"11 (2).JPG","text":"mine" }'
    (pictures / "metadata.jsonl").write_bytes(before)
    done = run("--image_dir", pictures, "--model", captioner, "--batch_size", 1, "--max_new_tokens", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert (pictures / "metadata.jsonl").read_bytes().startswith(before)
    assert [(row.file_name, row.captions) for row in read_captions(pictures)] == [
        ("11 (2).JPG", ("mine",)),
        ("11 (1).JPG", ("blue blue",)),
        ("11 (3).JPG", ("blue blue",)),
    ]


def test_unreadable_pictures_are_named_after_the_rest_is_done(pictures, captioner):
    whole = (pictures / "11 (1).JPG").read_bytes()
    (pictures / "11 (1).JPG").write_bytes(whole[: len(whole) // 2])
    (pictures / "note.png").write_text("no picture")
    done = run("--image_dir", pictures, "--model", captioner)
    assert done.returncode == 1
    assert "2 of 4 pictures have no caption" in done.stderr and "Traceback" not in done.stderr
    assert "11 (1).JPG" in done.stderr and "note.png" in done.stderr
    assert [row.file_name for row in read_captions(pictures)] == ["11 (2).JPG", "11 (3).JPG"]


def test_a_model_that_finds_no_words_writes_no_empty_caption(pictures, tmp_path_factory):
    silent = make_captioner(tmp_path_factory.mktemp("models") / "silent", "[SEP]")
    done = run("--image_dir", pictures, "--model", silent)
    assert done.returncode == 1 and "no words" in done.stderr
    assert not (pictures / "metadata.jsonl").exists()


def test_a_prompt_is_how_the_caption_begins(captioner):
    image = Image.new("RGB", (40, 60))
    assert describe(load_captioner(str(captioner)), [image] * 2, max_new_tokens=1, prompt="a photograph of") == [
        "a photograph of blue",
        "a photograph of blue",
    ]


def test_nothing_is_loaded_when_every_picture_has_a_caption(pictures, tmp_path):
    append_captions(pictures, [(f"11 ({number}).JPG", "mine") for number in range(1, 4)])
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = run("--image_dir", pictures, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "all 3 pictures" in done.stdout


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "no/such-captioner"], "--model no/such-captioner"),
        (["--batch_size", "0"], "--batch_size"),
        (["--max_new_tokens", "some"], "--max_new_tokens"),
        (["--image_dir", "/no such folder"], "no data set folder /no such folder"),
        (["--imagedir", "x"], "--imagedir"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(pictures, flags, complaint):
    done = run("--image_dir", pictures, *flags)
    assert done.returncode == 2
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_model_that_is_no_captioner_is_refused(tmp_path):
    with pytest.raises(UserError, match="--model /no such folder"):
        load_captioner("/no such folder")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="'clip'"):
        load_captioner(str(tmp_path))


def test_a_bad_row_or_an_empty_folder_is_refused(pictures, tmp_path_factory):
    (pictures / "metadata.jsonl").write_text("\n{")
    assert "metadata.jsonl, line 2" in run("--image_dir", pictures).stderr
    empty = tmp_path_factory.mktemp("empty")
    done = run("--image_dir", empty)
    assert (done.returncode, done.stderr) == (2, f"error: no pictures in {empty}\n")
