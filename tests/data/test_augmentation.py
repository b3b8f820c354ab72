"""The views of a picture: nothing is cut off, and they differ as far as was asked for."""

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
    list_augmentations,
    place,
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


def test_a_picture_is_seen_as_it_is_unless_asked_otherwise_and_never_mirrored_where_it_may_not():
    assert list_augmentations(False, 0.0) == NO_AUGMENTATION == (Augmentation(),)
    assert list_augmentations(True, 0.0) == (Augmentation(), Augmentation(mirrored=True))
    moved = list_augmentations(False, 0.1)
    assert (
        len(set(moved)) == AFFINE_VARIANTS and moved[0] == Augmentation() and not any(view.mirrored for view in moved)
    )
    assert sum(view.mirrored for view in list_augmentations(True, 0.1)) == AFFINE_VARIANTS


@pytest.mark.parametrize("most", [0.02, 0.1, 0.5])
def test_poses_fill_the_range_that_was_asked_for_and_do_not_leave_it(most):
    poses = [view.affine for view in list_augmentations(False, most)[1:]]
    assert all(1 - most <= pose.scale <= 1 and abs(pose.turn) <= most / 4 for pose in poses)
    assert max(pose.scale for pose in poses) - min(pose.scale for pose in poses) > 0.7 * most
    for values in ([p.right for p in poses], [p.down for p in poses], [p.turn * 4 / most for p in poses]):
        assert min(values) < -0.7 and max(values) > 0.7 and abs(sum(values)) < 0.2 * len(values)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (80, 80)])
@pytest.mark.parametrize("most", [0.02, 0.1, 0.5])
def test_all_of_a_picture_stays_in_the_frame(most, size):
    height, width = size
    for pose in (view.affine for view in list_augmentations(False, most)):
        scale, x, y = place(pose, *size)
        cos, sin = math.cos(pose.turn), math.sin(pose.turn)
        for right, down in itertools.product((-width, width), (-height, height)):
            assert abs(x + scale * (right * cos - down * sin) / width) <= 1 + 1e-6
            assert abs(y + scale * (right * sin + down * cos) / height) <= 1 + 1e-6


@pytest.mark.parametrize("view", list_augmentations(True, 0.1), ids=lambda view: f"{view.affine.scale:.2f}")
def test_no_part_of_a_picture_is_lost_or_doubled(view):
    pixels = with_squares()
    shown = apply_augmentation(pixels, view)
    assert shown.shape == pixels.shape and shown.min() >= -1 and shown.max() <= 1
    assert dark(shown) == pytest.approx(dark(pixels) * place(view.affine, 96, 64)[0] ** 2, rel=0.02)
    edges = torch.cat([shown[:, [0, -1]].flatten(), shown[:, :, [0, -1]].flatten()])
    assert edges.min() > 0.9  # its white ground goes on


def test_a_smaller_picture_lies_at_the_edge_it_was_moved_to():
    shown = apply_augmentation(with_squares(), Augmentation(affine=Affine(scale=0.5, right=1.0, down=-1.0)))
    assert middle(shown) == pytest.approx((16, -24), abs=0.2)
    assert dark(shown[:, 48:]) < 1 and dark(shown[:, :, :32]) < 1


def test_a_turn_is_clockwise_and_keeps_right_angles_in_a_portrait():
    pixels = torch.ones(3, 96, 64)
    pixels[:, 8:16, 28:36] = -1  # above the middle, 36 from it
    pose = Affine(turn=math.pi / 6)
    shown, scale = apply_augmentation(pixels, Augmentation(affine=pose)), place(pose, 96, 64)[0]
    assert middle(shown) == pytest.approx((scale * 36 * 0.5, scale * -36 * math.sqrt(3) / 2), abs=0.2)
    assert dark(shown) == pytest.approx(64 * scale**2, rel=0.02)


def test_what_is_not_moved_is_the_same_bits():
    pixels = torch.rand(3, 8, 6)
    assert torch.equal(apply_augmentation(pixels, Augmentation()), pixels)
    assert torch.equal(apply_augmentation(pixels, Augmentation(mirrored=True)), pixels.flip(-1))
