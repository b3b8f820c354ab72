"""Masks: where in a picture the loss counts, from a file beside it (white counts) or from its own transparency."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.augmentation import Augmentation, augment_mask
from data.images import has_alpha, is_animation, open_alpha, open_image, resize_and_crop
from data.input_files import InputFile
from metadata.containers import container_of, find_containers, is_container, list_masks, list_pictures
from metadata.image_files import (
    find_image_files,
    find_mask_files,
    find_nested_mask_files,
    find_nested_unsupported_files,
    mask_key,
    picture_keys,
)
from runtime.errors import InputChanged, UserError

# The least that must be white of a picture as it is trained, in latent pixels: no augmentation makes it vanish.
LEAST_WHITE = 1.0


@dataclass(frozen=True)
class Mask(InputFile):
    """A grey picture, or the alpha channel of the picture `path` itself."""

    from_alpha: bool = False
    noun: ClassVar[str] = "mask"

    @property
    def key(self) -> str:
        """What it is known by, beside its picture."""
        return "alpha" if self.from_alpha else self.sha256

    def load(self, height: int, width: int) -> torch.Tensor:
        """(1, height, width) in [0, 1], 1 where the loss counts, cropped as the picture is.

        Raises InputChanged where the file is not what it was, or cannot be decoded.
        """
        read = open_alpha if self.from_alpha else _open_grey
        try:
            grey = read(self.open())
        except ValueError as fault:
            raise InputChanged(f"{self.path}: {fault}; put it back, and run the same command again") from None
        return mask_values(grey, height, width)


def _open_grey(path: Path | BytesIO) -> Image.Image:
    """In mode L; black where it is transparent."""
    return open_image(path, background="black").convert("L")


def mask_values(grey: Image.Image, height: int, width: int) -> torch.Tensor:
    """(1, height, width) in [0, 1]: averages of the pixels of the part that its picture is cropped to."""
    values = np.asarray(resize_and_crop(grey, height, width, "box"), dtype=np.float32) / 255
    return torch.from_numpy(values)[None]


def latent_mask(mask: torch.Tensor, augmentation: Augmentation, size: Sequence[int]) -> torch.Tensor:
    """(1, H, W) → (1, h, w) of `size`, augmented with its picture and averaged over areas; in half precision."""
    return F.interpolate(augment_mask(mask, augmentation)[None], tuple(size), mode="area")[0].half()


def loss_weights(masks: Sequence[torch.Tensor | None], unmasked_weight: float) -> torch.Tensor | None:
    """(B, 1, h, w) what each latent pixel's error counts, from each sample's mask (1, h, w); None where none has one.

    White counts 1 and black `unmasked_weight`, divided by their mean over the sample: a small subject counts as much
    as a large one, and a sample without a mask counts as it did.
    """
    shape = next((mask.shape for mask in masks if mask is not None), None)
    if shape is None:
        return None
    white = torch.stack([torch.ones(shape) if mask is None else mask.float() for mask in masks])
    weights = white + unmasked_weight * (1 - white)
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


# --- Which picture has one ------------------------------------------------------------------------------------------


def find_masks(
    folder: Path, pictures: Iterable[Path], named: Mapping[Path, Path] | None = None
) -> tuple[dict[Path, Path], list[str]]:
    """({picture: its mask}, a line for each mask in the data set's `folder` that is none of exactly one picture).

    A mask is beside its picture, or the row names it: `named`, {picture: mask}. A file that is named as a mask, and is
    one of `pictures`, is a picture.
    """
    pictures, named = list(pictures), named or {}
    named_masks = set(named.values())
    containers = find_containers(folder)
    by_key: dict[str | None, list[Path]] = {}
    for mask in sorted(_find_mask_members(containers) if containers else _find_mask_files(folder, pictures)):
        by_key.setdefault(mask_key(mask), []).append(mask)
    masks = {
        picture: list(dict.fromkeys([*_named_of(picture, named), *_masks_of(picture, by_key)]))
        for picture in (pictures if by_key else named)
    }
    faults = _pictures_named_as_masks(pictures, named)
    faults += [
        f"{mask}: a mask, and no picture of that name is beside it; move it there, rename it, or give it a row if it "
        "is a picture"
        for mask in _without_picture(by_key, pictures)
        if mask not in named_masks
    ]
    faults += [
        f"{path}: a mask by its name, in a format that is not read; save it as PNG"
        for path in ([] if containers else find_nested_unsupported_files(folder))
        if mask_key(path)
    ]
    faults += [f"{', '.join(map(str, own))}: two masks of {p.name}; keep one" for p, own in masks.items() if own[1:]]
    return {picture: own[0] for picture, own in masks.items() if own}, faults


def _find_mask_files(folder: Path, pictures: Sequence[Path]) -> set[Path]:
    folders = {picture.parent for picture in pictures}
    found = {*find_nested_mask_files(folder), *(path for folder in folders for path in find_mask_files(folder))}
    return found.difference(pictures)


def _find_mask_members(containers: Sequence[Path]) -> set[Path]:
    return {mask for container in containers for mask in list_masks(container)}


def _pictures_named_as_masks(pictures: Sequence[Path], named: Mapping[Path, Path]) -> list[str]:
    there = set(pictures)
    return [
        f"{mask}: the `mask` of {picture.name}, and a picture with a row of its own; remove one of the two"
        for picture, mask in named.items()
        if mask in there
    ]


def _named_of(picture: Path, named: Mapping[Path, Path]) -> list[Path]:
    return [named[picture]] if picture in named else []


def _masks_of(picture: Path, by_key: Mapping[str | None, list[Path]]) -> list[Path]:
    return [mask for key in picture_keys(picture) for mask in by_key.get(key, [])]


def _without_picture(by_key: Mapping[str | None, list[Path]], pictures: Iterable[Path]) -> list[Path]:
    if not by_key:
        return []
    folders = {mask.parent for masks in by_key.values() for mask in masks}
    present = [*pictures, *(path for folder in folders for path in _pictures_in(folder))]
    keys = {key for picture in present for key in picture_keys(picture)}
    return [mask for key, masks in by_key.items() if key not in keys for mask in masks]


def _pictures_in(folder: Path) -> list[Path]:
    container = container_of(folder)
    return list_pictures(container)[0] if is_container(container) else find_image_files(folder)


def alpha_mask(picture: InputFile) -> Mask | None:
    """The mask that the picture's own transparency is; None where it has none."""
    transparent = picture.fact("has alpha", lambda: has_alpha(picture.path))
    return Mask(picture.path, from_alpha=True, facts=picture.facts) if transparent else None


# --- Whether it is usable -------------------------------------------------------------------------------------------


def open_mask(mask: Mask, size: tuple[int, int]) -> Image.Image:
    """The mask of a picture of `size`, (width, height), in mode L. Raises ValueError that says what is wrong."""
    if mask.from_alpha:
        grey = open_alpha(mask.path)
    elif is_animation(mask.path):
        raise ValueError("several frames or pages; a mask has one: save it as PNG")
    else:
        grey = _open_grey(mask.path)
    if grey.size != size:
        width, height = size
        raise ValueError(f"{grey.width} x {grey.height} px, and its picture has {width} x {height}; make them equal")
    if grey.getextrema() == (0, 0):
        raise ValueError(
            "transparent all over: nothing of it would count"
            if mask.from_alpha
            else "a mask that is all black: nothing of the picture would count; white is what counts"
        )
    return grey


def white_share(mask: Mask, picture_size: tuple[int, int], size: tuple[int, int], latent_size: Sequence[int]) -> float:
    """How much is white, 0 to 1, of what is trained at `size`, (height, width), of a picture of (width, height).

    Raises ValueError that names the file and says why it cannot be used.
    """

    def measure() -> float:
        white = latent_mask(mask_values(open_mask(mask, picture_size), *size), Augmentation(), latent_size).float()
        if white.sum() < LEAST_WHITE:
            raise ValueError(f"all black, or nearly, where the picture is cropped to {size[1]} x {size[0]} px")
        return white.mean().item()

    try:
        return mask.fact(f"white share {mask.from_alpha} {picture_size} {size} {tuple(latent_size)}", measure)
    except ValueError as fault:
        raise ValueError(f"{mask.path}: {fault}") from None


def refuse_masks(faults: Sequence[str]) -> None:
    """Raises UserError where there are any."""
    if faults:
        raise UserError("\n  ".join(["masks that cannot be used:", *faults]))
