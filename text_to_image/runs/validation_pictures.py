"""The pictures in OUTPUT/validation/: their names, and which prompt and seed each of them shows."""

import re
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from data.decoding import open_picture

FOLDER = "validation"
NAME = re.compile(r"step-(\d+)-(\d+)\.png")


@dataclass(frozen=True)
class ValidationPicture:
    """What a trained UNet made of `prompt` after optimisation step `step`; 0: the base."""

    path: Path
    step: int
    prompt: str
    seed: str


def picture_path(folder: Path, step: int, index: int) -> Path:
    """OUTPUT/validation/step-000100-0.png"""
    return folder / FOLDER / f"step-{step:06d}-{index}.png"


def picture_info(prompt: str, seed: int) -> PngInfo:
    """What the PNG says of itself, so that the pictures of other prompts, of an earlier start, are told apart."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_text("seed", str(seed))
    return info


def read_picture(path: Path) -> ValidationPicture:
    """PictureError where the file is no picture, OSError where it is gone."""
    match = NAME.fullmatch(path.name)
    assert match, path
    with open_picture(path) as image:
        prompt = image.info.get("prompt", f"picture {match[2]}")  # earlier versions wrote none
        return ValidationPicture(path, int(match[1]), prompt, image.info.get("seed", ""))


def list_pictures(folder: Path) -> list[Path]:
    """Of an output folder, by step and number."""
    found = [path for path in (folder / FOLDER).glob("step-*.png") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: tuple(map(int, NAME.fullmatch(path.name).groups())))  # type: ignore[union-attr]
