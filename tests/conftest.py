"""Fixtures that several test files share: a tiny Stable Diffusion pipeline and a captioned folder to train it on."""

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
        train(parse_args([str(word) for word in [*usual, *flags]]), stop)
        return tmp_path / name

    return run
