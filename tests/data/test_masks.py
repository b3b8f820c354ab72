"""Masks: found beside their pictures, cropped and moved with them, and what each part of a picture then counts."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from captioned_folder import write_captioned_folder
from clone import ROOT
from data.augmentation import Affine, Augmentation, apply_augmentation, augment_mask, list_augmentations
from data.dataset import hash_dataset, read_pictures, with_masks
from data.images import EXIF_ORIENTATION, load_pixel_values
from data.masks import Mask, find_masks, latent_mask, loss_weights, white_share
from runtime.errors import InputChanged, UserError

UNCHANGED = Augmentation()


def mask_of(rows) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def save_mask(path: Path, rows) -> Mask:
    """A grey PNG of the rows, 0 to 255."""
    Image.fromarray(np.array(rows, dtype=np.uint8)).save(path, "PNG")
    return Mask(path)


# --- What counts ----------------------------------------------------------------------------------------------------


def test_the_weights_are_those_worked_out_by_hand():
    quarter, half = mask_of([[1, 0], [0, 0]]), mask_of([[1, 1], [0, 0]])
    assert loss_weights([quarter, half], 0.0).tolist() == [[[[4, 0], [0, 0]]], [[[2, 2], [0, 0]]]]
    # White 1, black 0.5: a mean of 0.625, and 1 / 0.625 = 1.6.
    assert torch.allclose(loss_weights([quarter], 0.5), torch.tensor([[[[1.6, 0.8], [0.8, 0.8]]]]))
    # Half grey counts half of what is between: 0.5 + 0.2 * 0.5 = 0.6; the mean of 1, 0.6, 0.2, 0.2 is 0.5.
    grey = loss_weights([mask_of([[1, 0.5], [0, 0]])], 0.2)
    assert torch.allclose(grey, torch.tensor([[[[2.0, 1.2], [0.4, 0.4]]]]))


def test_a_sample_without_a_mask_counts_evenly_and_none_with_one_leaves_the_loss_as_it_was():
    assert loss_weights([None, None], 0.3) is None
    weights = loss_weights([None, mask_of([[1, 0, 0], [0, 0, 0]])], 0.3)
    assert torch.equal(weights[0], torch.ones(1, 2, 3))


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.1, 1.0])
def test_every_sample_counts_the_same_however_small_its_subject_is(unmasked_weight):
    masks = [torch.rand(1, 8, 6, generator=torch.Generator().manual_seed(i)) > 0.9 - i / 10 for i in range(4)]
    assert torch.allclose(loss_weights(masks, unmasked_weight).mean(dim=(1, 2, 3)), torch.ones(4))


# --- Where it lies --------------------------------------------------------------------------------------------------


def test_the_crop_is_the_one_worked_out_by_hand(tmp_path):
    """8 x 4 px, cut to the square in its middle, columns 2 to 5, and averaged over squares of 2 x 2."""
    mask = save_mask(
        tmp_path / "a.mask.png", [[255, 255, 0, 255, 0, 0, 255, 255]] * 2 + [[0, 0, 0, 0, 0, 255, 0, 0]] * 2
    )
    assert latent_mask(mask.load(4, 4), UNCHANGED, (2, 2)).tolist() == [[[0.5, 0], [0, 0.5]]]
    mirrored = Augmentation(mirrored=True)
    assert latent_mask(mask.load(4, 4), mirrored, (2, 2)).tolist() == [[[0, 0.5], [0.5, 0]]]


def test_a_mask_is_upright_as_its_picture_is(tmp_path):
    sideways = Image.fromarray(np.array([[255, 0, 0], [0, 0, 0]], dtype=np.uint8))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # turned by 90 degrees clockwise
    sideways.save(tmp_path / "a.mask.png", exif=exif)
    assert Mask(tmp_path / "a.mask.png").load(3, 2).tolist() == [[[0, 1], [0, 0], [0, 0]]]


@pytest.mark.parametrize("size", [(64, 64), (72, 56), (48, 64)])
def test_a_mask_stays_on_its_subject_in_every_crop_and_augmentation(tmp_path, size):
    """The picture is its own mask, white on black: what is white of it in a sample is what the mask says."""
    image = Image.new("L", (90, 120))
    ImageDraw.Draw(image).polygon([(20, 30), (70, 40), (55, 80), (30, 90)], fill=255)
    image.save(tmp_path / "a.png")
    pixels, mask = load_pixel_values(tmp_path / "a.png", *size), Mask(tmp_path / "a.png").load(*size)
    for augmentation in list_augmentations(True, 0.4):
        shown = (apply_augmentation(pixels, augmentation)[:1] + 1) / 2
        assert (augment_mask(mask, augmentation) - shown).abs().mean() < 0.01


def test_what_is_outside_of_the_picture_does_not_count():
    half = Augmentation(affine=Affine(scale=0.5, translate_x=-1, translate_y=1))  # in the lower left quarter
    moved = latent_mask(torch.ones(1, 16, 16), half, (4, 4))
    assert moved.tolist() == [[[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]]


# --- How it is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "transparent", "jpeg"])
def test_white_counts_in_every_kind_of_picture(tmp_path, mode):
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 4, 8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, dtype=np.uint16) * 257)
    elif mode == "transparent":  # white where it counts, nothing elsewhere
        image = Image.merge("LA", (Image.new("L", (8, 8), 255), image))
    elif mode != "jpeg":
        image = image.convert(mode)
    image.save(tmp_path / "a.mask", "JPEG" if mode == "jpeg" else "PNG")
    white = latent_mask(Mask(tmp_path / "a.mask").load(8, 8), UNCHANGED, (1, 2))
    assert torch.allclose(white, mask_of([[1, 0]]).half(), atol=0.01)  # a JPEG is not exact


def test_a_mask_from_alpha_is_how_opaque_the_picture_is(tmp_path):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 2))
    image.save(tmp_path / "a.png")
    assert Mask(tmp_path / "a.png", from_alpha=True).load(2, 4).tolist() == [[[1, 1, 0, 0]] * 2]


def test_a_mask_that_changes_during_a_run_is_never_trained_with(tmp_path):
    mask = save_mask(tmp_path / "a.mask.png", [[255, 0]])
    assert mask.key
    save_mask(mask.path, [[0, 255]])
    with pytest.raises(InputChanged, match=r"a\.mask\.png: another mask"):
        mask.load(1, 2)


# --- Which picture has one ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write_captioned_folder(tmp_path / "data", {"1.jpg": "a", "2.jpg": "b", "Sub 3.JPG": "c"})


def add_mask(folder: Path, name: str) -> Path:
    image = Image.new("L", (48, 64))
    image.paste(255, (12, 8, 36, 56))
    image.save(folder / name)
    return folder / name


def masks_in(folder: Path, from_alpha: bool = False) -> dict[str, str]:
    pictures = with_masks(folder, read_pictures(folder, short_captions=False), from_alpha)
    return {picture.path.name: picture.mask.path.name for picture in pictures if picture.mask}


def test_masks_are_found_beside_their_pictures(folder):
    for name in ("1.mask.png", "2.JPG-masklabel.webp", "sub 3.MASK.jpg"):
        add_mask(folder, name)
    assert masks_in(folder) == {"1.jpg": "1.mask.png", "2.jpg": "2.JPG-masklabel.webp", "Sub 3.JPG": "sub 3.MASK.jpg"}


@pytest.mark.parametrize(
    ("names", "culprit"),
    [
        (["4.mask.png"], "4.mask.png"),
        (["masks/1.mask.png"], "no picture"),
        (["1.mask.png", "1.mask.bmp"], "two masks"),
    ],
    ids=["no picture", "another folder", "two"],
)
def test_a_mask_that_is_not_of_one_picture_is_named(folder, names, culprit):
    (folder / "masks").mkdir()
    for name in names:
        add_mask(folder, name)
    with pytest.raises(UserError) as error:
        masks_in(folder)
    assert culprit in str(error.value) and names[0] in str(error.value)


def test_a_picture_without_a_suffix_has_one_mask_too(folder):
    shutil.move(folder / "1.jpg", folder / "1")
    rows = folder / "metadata.jsonl"
    rows.write_text(rows.read_text().replace('"1.jpg"', '"1"'))
    add_mask(folder, "1.mask.png")
    assert masks_in(folder) == {"1": "1.mask.png"}


def test_a_picture_without_a_row_may_have_a_mask(folder):
    Image.new("RGB", (48, 64)).save(folder / "4.png")
    add_mask(folder, "4.mask.png")
    assert masks_in(folder) == {}


def test_a_row_makes_a_picture_of_a_file_that_is_named_as_a_mask(folder):
    add_mask(folder, "1.mask.png")
    with (folder / "metadata.jsonl").open("a") as rows:
        rows.write('{"file_name": "1.mask.png", "text": "a mask"}\n')
    assert masks_in(folder) == {} and len(read_pictures(folder, short_captions=False)) == 4


def test_transparency_is_a_mask_only_where_it_is_asked_for_and_no_file_is_beside(folder):
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGBA", (48, 64), (9, 9, 9, 99)).save(folder / name, "PNG")
    add_mask(folder, "2.mask.png")
    assert masks_in(folder) == {"2.jpg": "2.mask.png"}
    assert masks_in(folder, from_alpha=True) == {"1.jpg": "1.jpg", "2.jpg": "2.mask.png"}


def test_the_hash_of_the_data_set_counts_masks_and_is_as_it_was_without(folder):
    def hash_now(from_alpha: bool = False) -> str:
        return hash_dataset(with_masks(folder, read_pictures(folder, short_captions=False), from_alpha))

    without = hash_dataset(read_pictures(folder, short_captions=False))
    assert hash_now() == hash_now(from_alpha=True) == without
    path = add_mask(folder, "1.mask.png")
    one = hash_now()
    save_mask(path, np.full((64, 48), 9))
    other = hash_now()
    shutil.move(path, folder / "2.mask.png")
    assert len({without, one, other, hash_now()}) == 4


def test_the_example_of_the_readme_makes_a_mask(tmp_path, monkeypatch):
    """Its picture is turned by EXIF, as those of phones are."""
    folder = write_captioned_folder(tmp_path / "pictures", {"1.jpg": "a"})
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (640, 480)).save(folder / "1.jpg", exif=exif)
    section = (ROOT / "dataset" / "README.md").read_text().split("## Masks")[1]
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})
    [picture] = with_masks(folder, read_pictures(folder, short_captions=False), from_alpha=False)
    share = white_share(picture.mask, (480, 640), (640, 480), (80, 60))
    assert share == pytest.approx(math.pi * 150 * 210 / (480 * 640), rel=0.01)  # an ellipse of 300 x 420 px


# --- Whether it is usable -------------------------------------------------------------------------------------------


def share(path: Path, size=(64, 48), from_alpha: bool = False) -> float:
    """Of a picture of 48 x 64 px and a latent of a half of `size`."""
    return white_share(Mask(path, from_alpha), (48, 64), size, (size[0] // 2, size[1] // 2))


def test_how_much_is_white_is_of_what_is_trained(folder):
    path = add_mask(folder, "1.mask.png")  # 24 x 48 of 48 x 64 px
    assert share(path) == pytest.approx(24 * 48 / (48 * 64))
    assert share(path, (48, 48)) == pytest.approx(24 * 48 / 48**2)  # rows 8 to 55: all of the white


def write_animation(path: Path) -> None:
    frames = [Image.new("L", (48, 64), grey) for grey in (255, 9)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def at_the_edge(path: Path) -> None:
    image = Image.new("L", (48, 64))
    image.paste(255, (0, 0, 48, 4))
    image.save(path)


def test_a_mask_in_a_format_that_is_not_read_and_one_that_is_a_broken_link_are_named(folder):
    (folder / "1.mask.tga").write_bytes(b"a mask of another program")
    with pytest.raises(UserError, match=r"1\.mask\.tga: .*not read"):
        masks_in(folder)
    (folder / "1.mask.tga").unlink()
    (folder / "1.mask.png").symlink_to(folder / "gone.png")
    assert masks_in(folder) == {"1.jpg": "1.mask.png"}
    with pytest.raises(ValueError, match=r"1\.mask\.png: .*no such file"):
        share(folder / "1.mask.png")


@pytest.mark.parametrize(
    ("write", "size", "key"),
    [
        (lambda path: Image.new("L", (64, 48), 255).save(path), (64, 48), "64 x 48"),
        (lambda path: Image.new("L", (48, 64)).save(path), (64, 48), "all black"),
        (at_the_edge, (48, 48), "cropped to 48 x 48"),
        (lambda path: path.write_text("no picture"), (64, 48), "not a picture"),
        (lambda path: path.touch(), (64, 48), "empty"),
        (write_animation, (64, 48), "several frames"),
    ],
    ids=["size", "black", "black when cropped", "no picture", "empty", "animated"],
)
def test_a_mask_that_cannot_be_used_is_named_with_the_reason(tmp_path, write, size, key):
    write(path := tmp_path / "1.mask.gif")
    with pytest.raises(ValueError, match=rf"1\.mask\.gif: .*{key}"):
        share(path, size)


def test_a_picture_that_is_transparent_all_over_is_named(tmp_path):
    Image.new("RGBA", (48, 64), (9, 9, 9, 0)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: transparent all over"):
        share(tmp_path / "1.png", from_alpha=True)


def test_the_smallest_mask_that_is_taken_is_left_in_every_augmentation(tmp_path):
    """One latent pixel, 8 x 8 px, scattered or not: the loss is never divided by nothing."""
    scattered = np.zeros((128, 128), dtype=np.uint8)
    scattered[5::16, 9::16] = 255
    mask = save_mask(tmp_path / "1.mask.png", scattered)
    assert white_share(mask, (128, 128), (128, 128), (16, 16)) == 1 / 256
    for augmentation in list_augmentations(True, 0.5):
        assert latent_mask(mask.load(128, 128), augmentation, (16, 16)).sum() > 0.1


def test_masks_of_a_folder_with_none_are_none(folder):
    assert find_masks(folder, [folder / "1.jpg"]) == ({}, [])
