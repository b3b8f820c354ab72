"""Fixtures that several test files share: a tiny Stable Diffusion pipeline and a captioned folder to train it on."""

import json
import os
import shutil
from pathlib import Path

import pytest

from captioned_folder import write_captioned_folder

# Before torch is imported, and for the scripts that tests start: tiny models are slower on many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs a model hub, and a question to one that cannot be reached is repeated for 20 s.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LONGEST_FIRST = ("slurm", "slow", "multiprocess")  # markers


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
        usual += ["--no_validation_pictures", "--no_report"]  # they would take twice as long as the tiny run itself
        train(parse_args([str(word) for word in [*usual, *flags]]), stop)
        return tmp_path / name

    return run


@pytest.fixture
def few_sampling_steps(monkeypatch) -> None:
    """Prior and validation images in three steps, for tests in this process that do not care what they show."""
    monkeypatch.setattr("training.prior.SAMPLER_STEPS", 3)
    monkeypatch.setattr("training.validation.SAMPLING_STEPS", 3)


@pytest.fixture(scope="session")
def finished_run(tiny_model, tmp_path_factory) -> Path:
    """A folder as training leaves it; tests that change one copy it."""
    from models.loading import load_noise_scheduler, load_unet, save_pipeline

    folder = tmp_path_factory.mktemp("output") / "garments-12345678"
    folder.mkdir()
    save_pipeline(load_unet(tiny_model), tiny_model, folder, load_noise_scheduler(tiny_model))
    sizes = [{"height": 48, "width": 80, "pictures": 1}, {"height": 72, "width": 56, "pictures": 3}]
    run = {"finished": True, "finished_at": "2026-01-01", "sizes": sizes, "example_prompts": ["a red t-shirt"]}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def images_of(finished_run, tmp_path):
    """Generates in this process: `images_of(flag, value, ...)` returns the images' paths, oldest row first."""
    from generated_folder import QUICK, rows
    from generation.generate import generate
    from inference import parse_args

    def run(*flags: object, folder: str = "pictures", model: Path = finished_run) -> list[Path]:
        words = ["--model", model, "--output_dir", tmp_path / folder, *QUICK, *flags]
        generate(parse_args([str(word) for word in words]))
        return [tmp_path / folder / row["file_name"] for row in rows(tmp_path / folder)]

    return run
