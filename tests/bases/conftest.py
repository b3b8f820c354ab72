"""Small models of Stable Diffusion 1 and 2, files of their weights, and the folders that are made of files."""

from pathlib import Path

import pytest

from bases.finding import ModelOptions, find_model
from bases.ldm_keys import StateDict
from one_file_models import ldm_weights, make_model, write_one_file


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[int, Path]:
    """{version: a small model}: one that predicts noise, and one that predicts velocity, as most of 2.x."""
    where = tmp_path_factory.mktemp("models")
    return {1: make_model(where / "one", 1), 2: make_model(where / "two", 2, "v_prediction")}


@pytest.fixture(scope="session")
def weights(folders) -> dict[int, StateDict]:
    return {version: ldm_weights(folder, version) for version, folder in folders.items()}


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("bases.finding.OUTPUTS", tmp_path / "output")
    return tmp_path / "output"


@pytest.fixture
def convert(folders, outputs):
    """`convert(file)` is the folder that is made of it."""

    def run(file: Path, tokenizer: Path | None = folders[1], allow_pickle: bool = False) -> Path:
        options = ModelOptions(tokenizer=tokenizer, allow_pickle=allow_pickle)
        return find_model(str(file), "--model", options).path

    return run


@pytest.fixture
def file_of(weights, tmp_path):
    """`file_of(version, change)` is a file of that version's weights and what `change` adds; None removes one."""

    def write(version: int, changes: dict | None = None, metadata: dict | None = None, name: str = "m") -> Path:
        changed = {**weights[version], **(changes or {})}
        changed = {key: weight for key, weight in changed.items() if weight is not None}
        metadata = {"modelspec.prediction_type": "v"} if version == 2 and metadata is None else metadata
        return write_one_file(tmp_path / f"{name}.safetensors", changed, metadata)

    return write
