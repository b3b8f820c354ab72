"""Training from one file, and generating with it: the same as from the folder that holds the same weights."""

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from background import count_rows, finish, kill, start
from bases.ldm_keys import StateDict
from export_checkpoint import parse_args
from exporting.export import export_checkpoint
from generated_folder import pixels
from generation.weights import find_weights
from models.loading import load_unet
from one_file_models import ldm_weights, make_model, write_one_file
from run_folder import weights
from runtime.errors import UserError
from runtime.paths import OUTPUTS

USUAL = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--seed", 0, "--resolution", 32, "--train_batch_size", 1]
USUAL += ["--checkpointing_steps", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "base", 1)


@pytest.fixture
def file(folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("bases.finding.OUTPUTS", tmp_path / "output")
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


@pytest.fixture
def tokenizer(folder, tmp_path) -> Path:
    """A copy that a test may remove."""
    return shutil.copytree(folder / "tokenizer", tmp_path / "words")


def assert_equal(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_from_one_file_resumes_without_the_file_and_ends_with_the_bits_of_the_folders_run(
    train_run, folder, file, tokenizer, monkeypatch, capsys
):
    expected = weights(train_run("folder", *USUAL, model=folder))
    command = [*USUAL, "--tokenizer", tokenizer]
    with monkeypatch.context() as patch:
        fail_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_run("file", *command, model=file)
    assert "gone:" not in capsys.readouterr().out
    file.unlink()
    shutil.rmtree(tokenizer)
    run = train_run("file", *command, model=file)
    assert f"gone: {file}, {tokenizer};" in capsys.readouterr().out
    assert_equal(weights(run), expected)
    assert json.loads((run / "run.json").read_text())["base_model"] == str(file)


@pytest.mark.slow
def test_a_run_from_one_file_that_is_killed_ends_with_the_bits_of_the_folders_run(
    train_run, folder, file, captioned_folder, tmp_path
):
    own = file.rename(tmp_path / f"killed-{uuid.uuid4().hex}.safetensors")  # the script converts into output/
    command = ["--pretrained_model_name_or_path", own, "--tokenizer", folder, "--dataset", captioned_folder, *USUAL]
    command += ["--output_dir", tmp_path / "file", "--max_train_steps", 8]
    try:
        [process] = killed = start(tmp_path / "log", 1, *command)
        process.until(lambda: count_rows(tmp_path / "file") >= 2)
        assert kill(killed), process.log.read_text()
        finish(start(tmp_path / "log", 1, *command))
    finally:
        for converted in (OUTPUTS / "converted").glob(f"{own.stem}-*"):
            shutil.rmtree(converted)
    expected = train_run("folder", *USUAL, "--max_train_steps", 8, model=folder)
    assert_equal(weights(tmp_path / "file"), weights(expected))


def test_a_lora_of_a_file_finds_its_base_and_tokenizer_again_from_anywhere(
    train_run, folder, file, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    run = train_run("lora", *USUAL, "--lora_rank", 2, "--tokenizer", "words", model=Path("base.safetensors"))
    record = json.loads((run / "run.json").read_text())
    assert (record["base_model"], record["arguments"]["tokenizer"]) == (str(file), str(tokenizer))
    monkeypatch.chdir("/")
    found = find_weights(str(run))
    assert torch.equal(load_unet(found.base).conv_in.weight, load_unet(folder).conv_in.weight)
    file.unlink()
    shutil.rmtree(tokenizer)
    assert find_weights(str(run)).base == found.base
    shutil.rmtree(tmp_path / "output")
    with pytest.raises(UserError, match=r"base\.safetensors: no such file.*name the file where it is now"):
        find_weights(str(run))


def test_a_finished_run_needs_neither_file_nor_tokenizer_and_leaves_a_tokenizer_unused(
    train_run, folder, file, tokenizer, tmp_path
):
    run = train_run("whole", *USUAL, "--max_train_steps", 1, "--tokenizer", tokenizer, model=file)
    for gone in (tokenizer, tmp_path / "output"):
        shutil.rmtree(gone)
    file.unlink()
    assert find_weights(str(run)).base.path == run
    assert find_weights(str(run), tokenizer=tokenizer).base.path == run
    assert find_weights(str(run), "latest", tokenizer=tokenizer).base.path == run


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
