"""A short fine-tune of the starter learns which words go with which pictures; broken training does not.

Two things the starter never saw, each with a word it never read: without training the pictures are neither blue nor
purple, and with the captions swapped 'denim jeans' are purple.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clone import ROOT
from measure_base import generate_samples
from models.loading import load_tokenizer
from models.sampling import guidance_scale_of
from render_garments import Spec, render
from runtime.paths import STARTER

pytestmark = pytest.mark.slow

STEPS = 200
THINGS = {
    "denim jeans": Spec("jeans", "blue", "plain", None, "front", "flat", None, 21),
    "kimono": Spec("dress", "purple", "plain", None, "front", "flat", None, 22),
}


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two things")
    rows = []
    for number, (word, spec) in enumerate(THINGS.items()):
        render(spec, 224, 288).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"{word} laid flat on a white background"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    output = tmp_path_factory.mktemp("output") / "run"
    command = [ROOT / "text_to_image" / "train_text_to_image.py", "--dataset", folder, "--output_dir", output]
    flags = ["--max_train_steps", STEPS, "--resolution", "192", "--prior_images", "0", "--seed", "0"]
    done = subprocess.run([sys.executable, *map(str, [*command, *flags])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def mean_colours(folder: Path, prompt: str) -> np.ndarray:
    """(4, 3) the mean colour of the middle of four pictures."""
    images = generate_samples(folder, [prompt] * 4, [(160, 224)] * 4, 20, guidance_scale_of(folder))
    return np.array([np.asarray(image)[70:110, 55:105].reshape(-1, 3).mean(0) for image in images])


def test_each_word_generates_its_own_garment(fine_tuned):
    jeans, kimonos = mean_colours(fine_tuned, "denim jeans"), mean_colours(fine_tuned, "kimono")
    blue = (jeans[:, 2] > jeans[:, 0] + 30) & (jeans[:, 1] > jeans[:, 0] + 8)
    purple = (kimonos[:, 2] > kimonos[:, 1] + 30) & (kimonos[:, 0] > kimonos[:, 1] + 20)
    assert blue.sum() >= 3, jeans
    assert purple.sum() >= 1, kimonos  # the base knows trousers better than kimonos, so some of them get legs and blue


def test_its_loss_falls(fine_tuned):
    rows = [json.loads(line) for line in (fine_tuned / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows]
    assert np.mean(losses[-30:]) < 0.85 * np.mean(losses[:30])


def test_words_after_token_77_are_learned(tmp_path):
    """Two captions, the same but for their last word, which CLIP alone would never read, and two pictures."""
    makers = {
        "alpha": Spec("jeans", "blue", "plain", None, "front", "flat", None, 31),
        "gamma": Spec("dress", "yellow", "plain", None, "front", "flat", None, 32),
    }
    long = "A garment that somebody has photographed from directly above in the soft light of a studio, " + ", ".join(
        f"with {what} that one can hardly see"
        for what in ("seams", "creases", "shadows", "stitches", "folds", "edges")
    )
    captions = {maker: f"{long}, and it was made by {maker}" for maker in makers}
    tokenizer = load_tokenizer(STARTER)
    ids = [tokenizer(caption, verbose=False).input_ids for caption in captions.values()]
    assert ids[0][:77] == ids[1][:77] and ids[0] != ids[1]

    (tmp_path / "data").mkdir()
    rows = []
    for maker, spec in makers.items():
        render(spec, 128, 128).save(tmp_path / "data" / f"{maker}.png")
        rows.append(json.dumps({"file_name": f"{maker}.png", "text": captions[maker]}) + "\n")
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(rows))
    command = [ROOT / "text_to_image" / "train_text_to_image.py", "--dataset", tmp_path / "data", "--output_dir"]
    flags = [tmp_path / "out", "--max_train_steps", 600, "--train_batch_size", 2, "--resolution", 128, "--seed", 0]
    done = subprocess.run([sys.executable, *map(str, [*command, *flags])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    for maker, caption in captions.items():
        images = generate_samples(tmp_path / "out", [caption] * 4, [(128, 128)] * 4, 20, guidance_scale_of(STARTER))
        colours = np.array([np.asarray(image)[40:90, 50:78].reshape(-1, 3).mean(0) for image in images])
        bluer = colours[:, 2] > colours[:, 0] + 15
        assert (bluer if maker == "alpha" else ~bluer).sum() >= 3, (maker, colours)
