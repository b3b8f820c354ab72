"""Renders show what their specs say, the same each time; captions are true and name denim only on request."""

import numpy as np
import pytest

from describe import JEANS_WORDS, caption_of
from garments import GARMENTS
from render_garments import COLOURS, CORNERS, KINDS, PATTERNS, Spec, mirrored_spec, render, sample_scene, sample_spec
from sentences import scattered_caption


def test_there_are_enough_kinds_and_colours():
    assert len(KINDS) >= 7 and len(COLOURS) >= 12 and len(PATTERNS) >= 3


def test_the_same_spec_gives_the_same_pixels_and_another_seed_gives_others():
    spec = sample_spec(5)
    assert np.array_equal(render(spec, 64, 64, 1), render(spec, 64, 64, 1))
    assert not np.array_equal(render(spec, 64, 64, 1), render(sample_spec(6), 64, 64, 1))


@pytest.mark.parametrize("kind", sorted(GARMENTS))
@pytest.mark.parametrize("view", ["front", "back"])
def test_each_garment_is_wholly_inside_the_picture_on_white(kind, view):
    spec = Spec(kind, "red", "plain", None, view, "flat", None, seed=3)
    pixels = np.asarray(render(spec, 96, 128, 1)).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert border.mean() >= 240
    assert (pixels.min(-1) < 180).mean() > 0.1


@pytest.mark.parametrize("corner", CORNERS)
def test_the_marker_is_a_black_square_in_its_corner(corner):
    spec = Spec("trousers", "red", "plain", None, "front", "flat", corner, seed=4)
    with_marker = np.asarray(render(spec, 96, 128, 2)).astype(int)
    dark = with_marker.max(-1) < 60
    rows, columns = np.nonzero(dark)
    assert ("upper" in corner) == (rows.mean() < 64) and ("left" in corner) == (columns.mean() < 48)
    assert 0.05 * 96 <= np.sqrt(dark.sum()) <= 0.085 * 96


def test_a_dyed_garment_has_its_colour():
    for colour in ("red", "green", "blue"):
        pixels = np.asarray(render(Spec("skirt", colour, "plain", None, "front", "flat", None, 7), 64, 64, 1))
        assert pixels[20:44, 24:40].reshape(-1, 3).mean(0).argmax() == ["red", "green", "blue"].index(colour)


def test_jeans_and_their_words_appear_only_on_request():
    for seed in range(3000):
        spec = sample_spec(seed)
        assert spec.kind != "jeans"
        caption = caption_of(spec, np.random.default_rng(seed)).lower()
        assert not any(word in caption for word in JEANS_WORDS), caption
    assert sample_spec(1, "jeans").kind == "jeans"
    assert "jeans" in caption_of(sample_spec(1, "jeans"), np.random.default_rng(1))


def test_captions_name_the_colour_and_the_corner_of_the_marker():
    for seed in range(500):
        spec = sample_spec(seed)
        caption = caption_of(spec, np.random.default_rng(seed), words=130).lower()
        assert spec.colour in caption or (spec.colour == "grey" and "gray" in caption)
        for word, corner in (("left", "left"), ("right", "right")):
            if f" {word}" in caption and "square" in caption:
                assert spec.marker and corner in spec.marker, caption


def test_captions_reach_from_a_few_words_to_three_chunks():
    lengths = [len(caption_of(sample_spec(s), np.random.default_rng(s)).split()) for s in range(400)]
    assert min(lengths) <= 3 and max(lengths) >= 100


def test_a_mirrored_picture_has_its_marker_on_the_other_side():
    spec = Spec("dress", "red", "plain", None, "front", "flat", "upper right", 1)
    assert mirrored_spec(spec).marker == "upper left"
    assert mirrored_spec(mirrored_spec(spec)) == spec


def test_a_fold_changes_the_outline():
    flat, folded = (
        np.asarray(render(Spec("trousers", "red", "plain", None, "front", fold, None, 9), 64, 64, 1).convert("L"))
        < 200
        for fold in ("flat", "knee")
    )
    assert folded.sum() < 0.95 * flat.sum()


def test_a_scene_lies_on_its_background_and_never_on_one_of_its_own_colour():
    pixels = np.asarray(render(Spec("skirt", "red", "plain", None, "front", "flat", None, 7, "blue"), 64, 64, 1))
    assert np.concatenate([pixels[:3], pixels[-3:]]).reshape(-1, 3).mean(0).argmax() == 2
    assert pixels[20:44, 24:40].reshape(-1, 3).mean(0).argmax() == 0
    scenes = [sample_scene(seed) for seed in range(300)]
    assert {"wood", "light wood", "dark wood"} < {spec.background for spec in scenes}
    assert all(spec.colour not in spec.background and spec.background != "white" for spec in scenes)


def test_every_caption_of_a_scene_names_its_background_and_none_says_white():
    for seed in range(400):
        spec, rng = sample_scene(seed), np.random.default_rng(seed)
        captions = [caption_of(spec, rng, words) for words in (0, 12, 30, 130)] + [scattered_caption(spec, rng, 30)]
        for caption in captions:
            assert spec.background.split()[0] in caption, (spec.background, caption)
            assert not any(f"white {word}" in caption for word in ("background", "table", "surface")), caption


def test_scattered_captions_name_the_colour_in_any_sentence():
    places = []
    for seed in range(400):
        spec = sample_spec(seed)
        sentences = scattered_caption(spec, np.random.default_rng(seed), 140).lower().split(". ")
        named = [i for i, sentence in enumerate(sentences) if f" is {spec.colour}" in sentence]
        places += [i / len(sentences) for i in named]
    assert len(places) > 100 and np.histogram(places, 4, (0, 1))[0].min() > 15
