"""A picture that the model's safety checker flags is black and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from generation.generate import generate
from inference import parse_args
from tiny_model import add_safety_checker


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """The tiny model with a checker whose threshold makes it flag everything."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    add_safety_checker(folder)
    return folder


def generate_rows(model: Path, to: Path, *flags: str) -> list[dict]:
    words = ["--model", str(model), "--prompt", "jeans", "--num_images", "2", "--steps", "2", "--output_dir", str(to)]
    generate(parse_args([*words, *flags]))
    return [json.loads(line) for line in (to / "images.jsonl").read_text().splitlines()]


def test_a_flagged_picture_is_black_counted_and_named(model, tmp_path, capsys):
    rows = generate_rows(model, tmp_path / "out", "--write_metadata")
    said = capsys.readouterr().out
    assert "2 withheld" in said and all(row["file_name"] in said for row in rows)
    assert all(row["withheld"] and row["safety_checker"] for row in rows)
    assert all(Image.open(tmp_path / "out" / row["file_name"]).getextrema() == ((0, 0),) * 3 for row in rows)
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_flagged_pictures_of_an_earlier_start_are_named_again(model, tmp_path, capsys):
    rows = generate_rows(model, tmp_path / "out")
    capsys.readouterr()
    assert generate_rows(model, tmp_path / "out", "--resume") == rows
    said = capsys.readouterr().out
    assert "2 withheld" in said and rows[0]["file_name"] in said and "2 of them there already" in said


def test_without_the_checker_the_picture_has_another_name(model, tmp_path):
    rows = generate_rows(model, tmp_path / "out")
    both = generate_rows(model, tmp_path / "out", "--no_safety_checker", "--resume")
    assert len(both) == 4 and not any("withheld" in row for row in both[2:])
    assert Image.open(tmp_path / "out" / both[2]["file_name"]).getextrema() != ((0, 0),) * 3
    assert both[:2] == rows


def test_a_checker_that_flags_nothing_changes_nothing(model, tmp_path):
    weights = model / "safety_checker"
    checker = StableDiffusionSafetyChecker.from_pretrained(weights)
    torch.nn.init.constant_(checker.concept_embeds_weights, 2.0)
    checker.save_pretrained(weights)
    checked, unchecked = (
        generate_rows(model, tmp_path / "a"),
        generate_rows(model, tmp_path / "b", "--no_safety_checker"),
    )
    for one, other in zip(checked, unchecked, strict=True):
        same = [Image.open(folder / row["file_name"]).tobytes() for folder, row in
                ((tmp_path / "a", one), (tmp_path / "b", other))]  # fmt: skip
        assert same[0] == same[1] and "withheld" not in one
