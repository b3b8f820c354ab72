"""What is measured of each checkpoint's pictures, and which checkpoint the numbers speak for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from evaluation.copies import measure_diversity
from evaluation.copies_report import NearestMatch
from evaluation.similarity import FeatureSimilarity, ImageSimilarity
from generation.weights import RESULT
from runs.metrics_file import METRICS_FILE, read_metrics

DIGITS = 6  # of the numbers in checkpoints.jsonl


@dataclass(frozen=True)
class CheckpointScore:
    """A row of checkpoints.jsonl; None where it was not measured."""

    checkpoint: str  # RESULT: what the run made in the end
    val_loss: float | None  # on held-out pictures, of the weights that generate
    nearest: float | None  # mean distance of its pictures to the nearest training picture of each
    copies: int | None  # of its pictures
    diversity: float | None  # mean distance of two of its pictures
    image_fidelity: float | None = None  # mean cosine to the training pictures
    prompt_fidelity: float | None = None  # mean cosine to the prompts

    def to_row(self) -> dict[str, str | int | float | None]:
        return {
            key: round(value, DIGITS) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class GeneratedPictures:
    """The pictures of one checkpoint, as thumbnails, and the prompt of each."""

    checkpoint: str
    pictures: Mapping[Path, Image.Image]
    prompts: Mapping[Path, str]


def held_out_losses(run: Path, checkpoints: Sequence[str]) -> dict[str, float | None]:
    """{checkpoint: its held-out loss} from metrics.jsonl, with the EMA weights where the run has some."""
    rows = {row["step"]: row for row in read_metrics(run / METRICS_FILE)}
    last = max(rows, default=0)
    losses: dict[str, float | None] = {}
    for name in checkpoints:
        row = rows.get(last if name == RESULT else int(name.rpartition("-")[2]), {})
        losses[name] = row.get("val_loss_ema", row.get("val_loss"))
    return losses


def score_checkpoint(
    own: GeneratedPictures, val_loss: float | None, similarity: ImageSimilarity, matches: Mapping[Path, NearestMatch]
) -> CheckpointScore:
    """`matches` are those of all checkpoints' pictures; empty where there are no training pictures."""
    found = [matches[path] for path in own.pictures if path in matches]
    pictures = list(own.pictures.values())
    return CheckpointScore(
        own.checkpoint,
        val_loss,
        nearest=float(np.mean([match.distance for match in found])) if found else None,
        copies=sum(match.is_copy for match in found) if found else None,
        diversity=measure_diversity(similarity, pictures).mean_distance if pictures else None,
    )


def measure_fidelity(
    own: GeneratedPictures, embedder: FeatureSimilarity, training_features: np.ndarray | None
) -> dict[str, Any]:
    """Mean cosines of the embedder's features, as DreamBooth measures them (arXiv:2208.12242, section 4.1).

    image_fidelity: of all pairs of a generated and a training picture, whose features are (N, D). prompt_fidelity: of
    each picture and its prompt, where the embedder reads text.
    """
    if not own.pictures:
        return {}
    features = embedder.features(list(own.pictures.values()))
    fidelity: dict[str, Any] = {}
    if training_features is not None:
        fidelity["image_fidelity"] = float((features @ training_features.T).mean())
    if embedder.reads_text:
        texts = embedder.text_features([own.prompts[path] for path in own.pictures])
        fidelity["prompt_fidelity"] = float((features * texts).sum(1).mean())
    return fidelity


# --- which one ------------------------------------------------------------------------------------------------------


class Criterion(NamedTuple):
    """Fewer checkpoints remain after each: those with the best value."""

    measure: str  # a field of CheckpointScore
    best: Callable[..., float]
    words: str


# The loss before the likeness: a model that learned its pictures by heart looks most like them.
CRITERIA = (
    Criterion("copies", min, "the fewest copies ({})"),
    Criterion("val_loss", min, "the lowest held-out loss ({:.4f})"),
    Criterion("image_fidelity", max, "the highest image fidelity ({:.3f})"),
)


def recommend(scores: Sequence[CheckpointScore]) -> tuple[CheckpointScore, str]:
    """(the one to take, why). Of equals the last."""
    remaining, reasons = list(scores), []
    for measure, best, words in CRITERIA:
        if measured := [score for score in remaining if getattr(score, measure) is not None]:
            value = best(getattr(score, measure) for score in measured)
            kept = [score for score in measured if getattr(score, measure) == value]
            reasons += [words.format(value)] if len(kept) < len(remaining) else []
            remaining = kept
    if len(remaining) > 1 or not reasons:
        reasons.append("the last of those that the numbers do not tell apart")
    return remaining[-1], ", then ".join(reasons)
