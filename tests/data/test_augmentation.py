"""Augmentations of a picture: nothing is cropped, and they differ as much as was asked for."""

import itertools
import math

import pytest
import torch

from data.augmentation import (
    AFFINE_VARIANTS,
    NO_AUGMENTATION,
    Affine,
    Augmentation,
    apply_augmentation,
    augmented_caption,
    fit_in_frame,
    list_augmentations,
)


def with_squares(height=96, width=64) -> torch.Tensor:
    """White, with a black square near each corner and one in the middle."""
    pixels = torch.ones(3, height, width)
    for y in (6, height // 2 - 4, height - 14):
        for x in (6, width // 2 - 4, width - 14):
            pixels[:, y : y + 8, x : x + 8] = -1
    return pixels


def dark(pixels: torch.Tensor) -> float:
    """How many pixels are black, those half covered counting half."""
    return ((1 - pixels[0]) / 2).sum().item()


def middle(pixels: torch.Tensor) -> tuple[float, float]:
    """(x, y) of what is dark, in pixels from the middle of the frame."""
    weight = (1 - pixels[0]) / 2
    height, width = weight.shape
    x, y = torch.arange(width) + 0.5 - width / 2, torch.arange(height) + 0.5 - height / 2
    return (weight.sum(0) @ x / weight.sum()).item(), (weight.sum(1) @ y / weight.sum()).item()


def test_a_picture_is_unchanged_by_default_and_never_mirrored_where_it_may_not_be():
    assert list_augmentations(False, 0.0) == NO_AUGMENTATION == (Augmentation(),)
    assert list_augmentations(True, 0.0) == (Augmentation(), Augmentation(mirrored=True))
    moved = list_augmentations(False, 0.1)
    assert len(set(moved)) == AFFINE_VARIANTS and moved[0] == Augmentation() and not any(one.mirrored for one in moved)
    assert sum(one.mirrored for one in list_augmentations(True, 0.1)) == AFFINE_VARIANTS


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.5])
def test_affine_variants_fill_the_range_that_was_asked_for_and_do_not_leave_it(strength):
    affines = [augmentation.affine for augmentation in list_augmentations(False, strength)[1:]]
    assert all(1 - strength <= a.scale <= 1 and abs(a.rotation) <= strength / 4 for a in affines)
    assert max(a.scale for a in affines) - min(a.scale for a in affines) > 0.7 * strength
    rotations = [a.rotation * 4 / strength for a in affines]
    for values in ([a.translate_x for a in affines], [a.translate_y for a in affines], rotations):
        assert min(values) < -0.7 and max(values) > 0.7 and abs(sum(values)) < 0.2 * len(values)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (80, 80)])
@pytest.mark.parametrize("strength", [0.02, 0.1, 0.5])
def test_all_of_a_picture_stays_in_the_frame(strength, size):
    height, width = size
    for affine in (augmentation.affine for augmentation in list_augmentations(False, strength)):
        scale, x, y = fit_in_frame(affine, *size)
        cos, sin = math.cos(affine.rotation), math.sin(affine.rotation)
        for right, down in itertools.product((-width, width), (-height, height)):
            assert abs(x + scale * (right * cos - down * sin) / width) <= 1 + 1e-6
            assert abs(y + scale * (right * sin + down * cos) / height) <= 1 + 1e-6


@pytest.mark.parametrize("augmentation", list_augmentations(True, 0.1), ids=lambda one: f"{one.affine.scale:.2f}")
def test_no_part_of_a_picture_is_lost_or_doubled(augmentation):
    pixels = with_squares()
    shown = apply_augmentation(pixels, augmentation)
    assert shown.shape == pixels.shape and shown.min() >= -1 and shown.max() <= 1
    assert dark(shown) == pytest.approx(dark(pixels) * fit_in_frame(augmentation.affine, 96, 64)[0] ** 2, rel=0.02)
    edges = torch.cat([shown[:, [0, -1]].flatten(), shown[:, :, [0, -1]].flatten()])
    assert edges.min() > 0.9  # its white background continues


def test_a_smaller_picture_lies_at_the_edge_it_was_moved_to():
    shown = apply_augmentation(
        with_squares(), Augmentation(affine=Affine(scale=0.5, translate_x=1.0, translate_y=-1.0))
    )
    assert middle(shown) == pytest.approx((16, -24), abs=0.2)
    assert dark(shown[:, 48:]) < 1 and dark(shown[:, :, :32]) < 1


def test_a_rotation_is_clockwise_and_keeps_right_angles_in_a_portrait():
    pixels = torch.ones(3, 96, 64)
    pixels[:, 8:16, 28:36] = -1  # above the middle, 36 from it
    affine = Affine(rotation=math.pi / 6)
    shown, scale = apply_augmentation(pixels, Augmentation(affine=affine)), fit_in_frame(affine, 96, 64)[0]
    assert middle(shown) == pytest.approx((scale * 36 * 0.5, scale * -36 * math.sqrt(3) / 2), abs=0.2)
    assert dark(shown) == pytest.approx(64 * scale**2, rel=0.02)


def test_what_is_not_moved_is_the_same_bits():
    pixels = torch.rand(3, 8, 6)
    assert torch.equal(apply_augmentation(pixels, Augmentation()), pixels)
    assert torch.equal(apply_augmentation(pixels, Augmentation(mirrored=True)), pixels.flip(-1))


def test_a_mirrored_picture_has_the_mirrored_caption():
    caption = "a pocket on the left"
    assert augmented_caption(caption, Augmentation(affine=Affine(scale=0.9))) == caption
    assert augmented_caption(caption, Augmentation(mirrored=True)) == "a pocket on the right"
