"""Which checkpoint the numbers speak for, and the numbers themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.checkpoint_scores import (
    CheckpointScore,
    GeneratedPictures,
    held_out_losses,
    measure_fidelity,
    recommend,
    score_checkpoint,
)
from evaluation.copies_report import NearestMatch
from evaluation.similarity import StructuralSimilarity


def score(name: str, **measured) -> CheckpointScore:
    return CheckpointScore(name, **{"val_loss": None, "nearest": None, "copies": None, "diversity": None, **measured})


@pytest.mark.parametrize(
    ("scores", "best", "why"),
    [
        ([score("a", copies=0, val_loss=0.2), score("b", copies=3, val_loss=0.1)], "a", "fewest copies (0)"),
        ([score("a", copies=1, val_loss=0.2), score("b", copies=1, val_loss=0.1)], "b", "held-out loss (0.1000)"),
        ([score("a", image_fidelity=0.9), score("b", image_fidelity=0.5)], "a", "image fidelity (0.900)"),
        ([score("a", val_loss=0.1, image_fidelity=0.1), score("b", val_loss=0.2, image_fidelity=0.9)], "a", "loss"),
        ([score("a"), score("b")], "b", "the last"),
        ([score("a", val_loss=0.1), score("b", val_loss=0.1), score("c", val_loss=0.3)], "b", "the last"),
        ([score("a", val_loss=0.1), score("b")], "a", "held-out loss"),
        ([score("a", copies=0)], "a", "the last"),
    ],
)
def test_the_one_to_take_copies_least_and_then_has_the_lowest_loss(scores, best, why):
    chosen, reason = recommend(scores)
    assert chosen.checkpoint == best and why in reason


def test_the_loss_is_that_of_the_checkpoints_own_step_and_of_its_ema(tmp_path):
    rows = [
        {"step": 1, "train_loss": 1.0},
        {"step": 2, "val_loss": 0.5, "val_loss_ema": 0.4},
        {"step": 3},
        {"step": 4, "val_loss": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["checkpoint-1", "checkpoint-2", "checkpoint-9", "result"]
    assert list(held_out_losses(tmp_path, names).values()) == [None, 0.4, None, 0.3]
    assert held_out_losses(tmp_path / "nowhere", ["result"]) == {"result": None}


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_nearest_is_the_mean_distance_and_copies_are_counted_of_its_own_pictures():
    paths = [Path(name) for name in ("a.png", "b.png", "other.png")]
    matches = {path: NearestMatch(path, Path("1.jpg"), distance, distance < 0.1, "1.jpg")
               for path, distance in zip(paths, (0.05, 0.25, 0.01), strict=True)}  # fmt: skip
    own = GeneratedPictures("checkpoint-1", {path: noise(i) for i, path in enumerate(paths[:2])}, {})
    similarity = StructuralSimilarity()
    found = score_checkpoint(own, 0.5, similarity, matches)
    assert (found.checkpoint, found.val_loss, found.copies) == ("checkpoint-1", 0.5, 1)
    assert found.nearest == pytest.approx(0.15)
    between = similarity.distances([noise(0), noise(1)], [noise(1), noise(0)])
    assert found.diversity == pytest.approx(np.diag(between).mean())
    without = score_checkpoint(own, None, similarity, {})
    assert without.nearest is None and without.copies is None and without.diversity == found.diversity
    single = GeneratedPictures("checkpoint-1", {paths[0]: noise(0)}, {})
    assert score_checkpoint(single, None, similarity, matches).diversity is None


class FixedFeatures:
    """An embedder of two dimensions that knows its pictures by size and its texts by length."""

    reads_text = True

    def features(self, pictures):
        return np.array([[1.0, 0.0] if picture.width == 64 else [0.6, 0.8] for picture in pictures])

    def text_features(self, texts):
        return np.array([[0.0, 1.0] if text == "tall" else [1.0, 0.0] for text in texts])


def test_fidelity_is_the_mean_cosine_of_all_pairs_and_of_each_picture_with_its_own_prompt():
    paths = [Path("a.png"), Path("b.png")]
    pictures = dict(zip(paths, (noise(0), noise(1).resize((32, 64))), strict=True))
    own = GeneratedPictures("result", pictures, {paths[0]: "wide", paths[1]: "tall"})
    training = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    found = measure_fidelity(own, FixedFeatures(), training)
    assert found["image_fidelity"] == pytest.approx(np.mean([1, 0, 0.8, 0.6, 0.8, 0.96]))
    assert found["prompt_fidelity"] == pytest.approx((1 + 0.8) / 2)
    assert "image_fidelity" not in measure_fidelity(own, FixedFeatures(), None)
    assert measure_fidelity(GeneratedPictures("result", {}, {}), FixedFeatures(), training) == {}
