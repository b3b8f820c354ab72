"""Training with masks, end to end: with everything else, resumed and stored, and without a mask as it always was."""

import json
from pathlib import Path

import pytest
from PIL import Image

from captioned_folder import write_captioned_folder
from run_folder import assert_same_bits, rows
from runtime.errors import UserError

NAME = "11 (1).mask.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_captioned_folder(tmp_path / "data")


def add_mask(folder: Path, name: str = NAME, box=(10, 8, 30, 40)) -> Path:
    mask = Image.new("L", (48, 64))
    mask.paste(255, box)
    mask.save(folder / name)
    return folder / name


def test_masks_go_together_with_all_that_weighs_losses_stored_or_not(train_run, folder, few_sampling_steps):
    """That a masked run resumes to the same bits is in test_resume.py, whose data have a mask."""
    add_mask(folder)
    usual = ["--max_train_steps", 2, "--seed", 0, "--learning_rate", 1e-3, "--train_batch_size", 2, "--random_flip"]
    usual += ["--unmasked_weight", 0.1, "--prior_images", 1, "--use_ema", "--snr_gamma", 5, "--dream_training"]
    stored = train_run("stored", *usual, dataset=folder)
    live = train_run("live", *usual, "--no_cache", dataset=folder)
    for row, other in zip(rows(stored), rows(live), strict=True):
        assert {name: row[name] for name in row if "loss" in name} == pytest.approx(
            {name: other[name] for name in other if "loss" in name}, abs=1e-4
        )


def test_a_mask_that_is_white_all_over_changes_no_bit(train_run, folder):
    usual = ["--max_train_steps", 2, "--seed", 0, "--learning_rate", 1e-3, "--checkpointing_steps", 2]
    plain = train_run("plain", *usual, dataset=folder)
    add_mask(folder, box=(0, 0, 48, 64))
    assert_same_bits(plain, train_run("masked", *usual, dataset=folder), 2)


def test_the_fixed_losses_are_masked_too(train_run, folder, tmp_path):
    """Nothing is learned, so that the losses differ by the masks alone."""
    held_out = write_captioned_folder(tmp_path / "held out")
    usual = ["--max_train_steps", 1, "--learning_rate", 1e-12, "--seed", 0, "--validation_dir", held_out]
    plain = rows(train_run("plain", *usual, dataset=folder))[-1]
    for masked_folder in (folder, held_out):
        add_mask(masked_folder, box=(0, 0, 8, 8))
    masked = rows(train_run("masked", *usual, dataset=folder))[-1]
    for name in ("train_fixed_loss", "val_loss"):
        assert masked[name] != pytest.approx(plain[name], rel=1e-4)


def test_the_summary_says_how_many_pictures_have_a_mask_and_how_much_is_white(train_run, folder, capsys):
    add_mask(folder, box=(0, 0, 24, 64))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": add_mask(folder, "11 (2).mask.png").name, "text": "a mask"}) + "\n")
    train_run("out", "--dry_run", "--no_timing", "--unmasked_weight", 0.25, dataset=folder)
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if line.startswith("masks")]
    assert "1 of 4 pictures" in line and "50.0% white" in line and "0.25" in line
    assert "PICTURES" in said and "11 (2).mask.png" in said.partition("PICTURES")[2]


@pytest.mark.parametrize("flags", [("--mask_from_alpha",), ("--unmasked_weight", 0.1)], ids=str)
def test_a_flag_about_masks_without_any_is_refused(train_run, folder, tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        train_run("out", *flags, dataset=folder)
    assert not (tmp_path / "out").exists()


def test_every_mask_that_cannot_be_used_is_named_before_anything_is_written(train_run, folder, tmp_path):
    add_mask(folder, box=(0, 0, 0, 0))
    Image.new("L", (64, 48), 255).save(folder / "11 (3).mask.png")
    with pytest.raises(UserError) as refused:
        train_run("out", "--validation_split", 0.3, dataset=folder)
    assert NAME in str(refused.value) and "11 (3).mask.png" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_run_with_another_mask_is_another_run(train_run, folder):
    add_mask(folder)
    train_run("out", "--max_train_steps", 1, "--seed", 0, dataset=folder)
    add_mask(folder, box=(0, 0, 9, 9))
    with pytest.raises(UserError, match="masks"):
        train_run("out", "--max_train_steps", 1, "--seed", 0, dataset=folder)
