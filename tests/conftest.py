"""Fixtures that several test files share: a tiny Stable Diffusion pipeline and a captioned folder to train it on."""

import json
import os
import shutil
from pathlib import Path

import pytest

# Before torch is imported, and for the scripts that tests start: tiny models are slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs a model hub, and a question to one that cannot be reached is repeated for 20 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LONGEST_FIRST = ("slurm", "slow", "multiprocess")  # markers

CAPTIONS = {
    "11 (1).JPG": "A single pair of denim jeans laid flat on a white background, seen from the front. It is faded.",
    "11 (2).JPG": "A red t-shirt laid flat on a white background.",
    "11 (3).JPG": "A single pair of denim jeans laid flat on a white background, seen from the back. "
    + "The legs. " * 30,
}


def pytest_collection_modifyitems(config, items) -> None:
    """Files that take long begin first where several workers share them, so that none is left with one at the end."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        marks: dict[Path, set[str]] = {item.path: set() for item in items}
        for item in items:
            marks[item.path].update(mark.name for mark in item.iter_markers())
        items.sort(key=lambda item: [marker not in marks[item.path] for marker in LONGEST_FIRST])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """In fp16, as the starter model is stored."""
    import torch

    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float16)


@pytest.fixture
def own_model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory) -> Path:
    """Three portrait JPEGs of 48 x 64 px and their metadata.jsonl; tests that change a folder make their own."""
    return write_captioned_folder(tmp_path_factory.mktemp("data") / "garments")


@pytest.fixture
def train_run(tiny_model, captioned_folder, tmp_path):
    """Trains in this process: `train_run(name, flag, value, ...)` returns the output folder."""
    from train_text_to_image import parse_args
    from training.train import train

    def run(name: str, *flags: object, model: Path = tiny_model, dataset: Path = captioned_folder, stop=None) -> Path:
        usual = ["--pretrained_model_name_or_path", model, "--dataset", dataset, "--output_dir", tmp_path / name]
        train(parse_args([str(word) for word in [*usual, *flags]]), stop)
        return tmp_path / name

    return run


def write_captioned_folder(folder: Path, captions: dict[str, str] = CAPTIONS) -> Path:
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for name, caption in captions.items():
        image = Image.new("RGB", (48, 64), "white")
        ImageDraw.Draw(image).rectangle((12, 6, 36, 58), fill="red" if "red" in caption else "navy")
        image.save(folder / name, format="JPEG")
    rows = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder
