"""Copies are near whatever was done to them and other garments are far, by structure and by a model's features."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from evaluation.similarity import FeatureSimilarity, StructuralSimilarity, background_colour, comparison_size
from render_garments import render, sample_spec
from runtime.errors import UserError

WIDTH, HEIGHT = 168, 216


def jeans(seed: int) -> Image.Image:
    return render(sample_spec(seed, "jeans"), WIDTH, HEIGHT, 1)


def moved(picture: Image.Image, right: int, down: int) -> Image.Image:
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture, (right, down))
    return canvas


def recoloured(picture: Image.Image) -> Image.Image:
    hue, *rest = picture.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 90) % 256), *rest)).convert("RGB")


def centred(size: tuple[int, int], picture: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


COPIES = {
    "exact": lambda picture: picture,
    "mirrored": ImageOps.mirror,
    "moved": lambda picture: moved(picture, 9, -7),
    "recoloured": recoloured,
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.75),
    "lighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.25),
    "smaller": lambda picture: centred(picture.size, picture.resize((158, 203))),
    "soft": lambda picture: picture.filter(ImageFilter.GaussianBlur(1.5)),
    "compressed": compressed,
    "on a square": lambda picture: ImageOps.pad(picture, (192, 192), color="white"),
    "much of it": lambda picture: compressed(moved(ImageOps.mirror(recoloured(picture)), 5, 4)),
}


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return [jeans(seed) for seed in range(3)]


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_near_its_original_and_nearer_than_to_any_other(originals, change):
    distances = StructuralSimilarity().distances([COPIES[change](picture) for picture in originals], originals)
    assert np.diag(distances).max() < 0.05
    assert (distances.argmin(1) == [0, 1, 2]).all()


def test_other_jeans_and_other_garments_are_far(originals):
    others = [jeans(100 + seed) for seed in range(12)]
    others += [render(sample_spec(200 + seed), WIDTH, HEIGHT, 1) for seed in range(12)]
    assert StructuralSimilarity().distances(others, originals).min() > 0.08


def test_a_common_background_of_any_colour_does_not_count():
    """Two different small things on a large background of the same colour."""
    empty, one, other = (Image.new("RGB", (160, 160), (120, 140, 90)) for _ in range(3))
    one.paste(jeans(1).resize((42, 54)), (60, 50))
    other.paste(render(sample_spec(3, "t-shirt"), 42, 54, 1), (60, 50))
    assert background_colour(one) == (120, 140, 90)
    assert StructuralSimilarity().distances([one], [other])[0, 0] > 0.2
    assert StructuralSimilarity().distances([empty], [empty])[0, 0] == pytest.approx(0)


def test_pictures_may_have_any_size_and_shape():
    pictures = [Image.new("RGB", size, "white") for size in ((8, 8), (400, 20), (20, 400))]
    assert comparison_size(pictures[1]) == (64, 24)
    assert np.isfinite(StructuralSimilarity().distances(pictures, [jeans(0), *pictures])).all()


# --- a vision model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """`embedder(kind)` is a folder with a tiny random model and its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    def make(kind: str):
        folder = tmp_path_factory.mktemp("embedder") / kind
        torch.manual_seed(0)
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
        if kind == "dinov2":
            model = Dinov2Model(Dinov2Config(**small, patch_size=8))
        else:
            text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            vision = {**small, "patch_size": 8, "intermediate_size": 32}
            model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=vision))
        model.save_pretrained(folder, safe_serialization=True)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_a_vision_models_features_find_exact_and_mirrored_copies(embedder, originals, kind):
    similarity = FeatureSimilarity(str(embedder(kind)))
    copies = [originals[2], ImageOps.mirror(originals[0]), originals[1]]
    distances = similarity.distances(copies, originals)
    assert (distances.argmin(1) == [2, 0, 1]).all()
    assert distances.min(1).max() < 1e-5 and distances[0, 0] > 1e-4
    assert similarity.features([originals[0]] * 20).shape[0] == 20  # more than one batch


def test_an_embedder_of_pickles_or_of_another_kind_is_refused_in_one_line(embedder, tiny_model, tmp_path):
    import torch

    folder = shutil.copytree(embedder("dinov2"), tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for name in (folder, tiny_model / "text_encoder", tmp_path / "nothing"):
        with pytest.raises(UserError, match="--embedder .*: (not a vision model|no such folder)") as caught:
            FeatureSimilarity(str(name))
        assert "\n" not in str(caught.value)
