"""Training from one file, and generating with it: the same as from the folder that holds the same weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export_checkpoint import parse_args
from exporting.export import export_checkpoint
from generated_folder import pixels
from generation.weights import find_weights
from models.loading import load_unet
from one_file_models import ldm_weights, make_model, write_one_file
from run_folder import weights
from runtime.errors import UserError

USUAL = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--seed", 0, "--resolution", 64, "--checkpointing_steps", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base", 1)


@pytest.fixture
def file(folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("models.finding.OUTPUTS", tmp_path / "output")
    return write_one_file(tmp_path / "base.safetensors", ldm_weights(folder, 1))


def fail_in_step(monkeypatch, number: int) -> None:
    """The third step is never done, as if the process had been killed in it."""
    from training import train

    whole, steps = train.train_step, []

    def train_step(*args, **settings):
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        return whole(*args, **settings)

    monkeypatch.setattr(train, "train_step", train_step)


def test_training_from_one_file_that_is_killed_and_resumed_ends_with_the_bits_of_the_folders_run(
    train_run, folder, file, monkeypatch
):
    expected = weights(train_run("folder", *USUAL, model=folder))
    with monkeypatch.context() as patch:
        fail_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_run("file", *USUAL, "--tokenizer", folder, model=file)
    found = weights(train_run("file", *USUAL, "--tokenizer", folder, model=file))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_lora_of_a_file_finds_its_base_and_tokenizer_again_from_anywhere(
    train_run, folder, file, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    tokenizer = shutil.copytree(folder / "tokenizer", tmp_path / "words")
    run = train_run("lora", *USUAL, "--lora_rank", 2, "--tokenizer", "words", model=Path("base.safetensors"))
    record = json.loads((run / "run.json").read_text())
    assert (record["base_model"], record["arguments"]["tokenizer"]) == (str(file), str(tokenizer))
    monkeypatch.chdir("/")
    found = find_weights(str(run))
    assert torch.equal(load_unet(found.base).conv_in.weight, load_unet(folder).conv_in.weight)
    file.unlink()
    with pytest.raises(UserError, match=r"base\.safetensors"):
        find_weights(str(run))


def test_a_finished_run_needs_no_tokenizer(train_run, folder, file):
    run = train_run("whole", *USUAL, "--tokenizer", folder, model=file)
    assert find_weights(str(run)).base.path == run


def test_inference_generates_with_a_file_what_it_generates_with_the_folder(images_of, folder, file):
    size = ["--prompt", "denim jeans", "--num_images", 1, "--height", 64, "--width", 64]
    [expected] = images_of(*size, model=folder, folder="with folder")
    [found] = images_of(*size, "--tokenizer", folder, model=file, folder="with file")
    assert np.array_equal(pixels(found), pixels(expected))


def test_a_ckpt_is_generated_with_and_exported_where_pickles_are_allowed(images_of, folder, file, tmp_path):
    torch.save({"state_dict": load_file(file)}, tmp_path / "base.ckpt")
    size = ["--prompt", "denim jeans", "--num_images", 1, "--height", 64, "--width", 64, "--tokenizer", folder]
    to = ["--model", tmp_path / "base.ckpt", "--to", tmp_path / "again.safetensors", "--dtype", "fp32", "--no_verify"]
    export = [str(word) for word in [*to, "--tokenizer", folder]]
    with pytest.raises(UserError, match=r"base\.ckpt: a pickle.*add --allow_pickle"):
        images_of(*size, model=tmp_path / "base.ckpt")
    with pytest.raises(UserError, match=r"base\.ckpt: a pickle.*add --allow_pickle"):
        export_checkpoint(parse_args(export))
    assert images_of(*size, "--allow_pickle", model=tmp_path / "base.ckpt")
    export_checkpoint(parse_args([*export, "--allow_pickle"]))
    again, expected = load_file(tmp_path / "again.safetensors"), load_file(file)
    assert again.keys() == expected.keys() and all(torch.equal(again[key], expected[key]) for key in expected)
