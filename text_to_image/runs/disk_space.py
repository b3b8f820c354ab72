"""What a run will write and whether there is room for it, before the first step."""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.folders import PARTS, count_lora_parameters, count_parameters
from models.lora import LORA_TARGETS
from models.text_encoding import count_chunks
from runs.checkpoints import complete_checkpoints
from runtime.errors import WorkError
from training.plan import Plan

FLOAT = 4  # bytes


@dataclass(frozen=True)
class DiskSpace:
    """In bytes."""

    checkpoint: int  # each
    kept: int  # how many checkpoints there will be at the end
    needed: int  # still: encodings, checkpoints and the result, at the worst moment
    free: int

    @property
    def line(self) -> str:
        kept = "1 checkpoint" if self.kept == 1 else f"{self.kept} checkpoints"
        return f"{kept} of about {self.checkpoint / 1e9:.2g} GB, {self.free / 1e9:.3g} GB free"


def measure_space(args: argparse.Namespace, plan: Plan, tokenizer, folder: Path) -> DiskSpace:
    """A checkpoint holds the weights, Adam's two averages of them and perhaps EMA; the result a whole pipeline."""
    if args.lora_rank:
        weights = result = FLOAT * count_lora_parameters(plan.base, args.lora_rank, LORA_TARGETS)
    else:
        weights = FLOAT * count_parameters(plan.base)
        result = FLOAT * sum(count_parameters(plan.base, part) for part in PARTS)
    checkpoint = round(weights * (1 + (0.5 if args.use_8bit_adam else 2) + args.use_ema))
    written = plan.steps // args.checkpointing_steps
    best = bool(args.validation_split or args.validation_dir)  # kept beside those of the limit
    kept = min(written, (args.checkpoints_total_limit or written) + best)
    at_once = min(written, kept + 1)  # a new one is written before the oldest goes
    still = max(0, at_once - len(complete_checkpoints(folder)))
    encoded = 0
    if args.cache and not args.latents_cache_dir and not (folder / "cache").is_dir():
        encoded = latents_size(plan) + texts_size(plan, tokenizer, args.max_token_chunks)
    there = next(path for path in [folder, *folder.resolve().parents] if path.is_dir())
    return DiskSpace(checkpoint, kept, encoded + still * checkpoint + result, shutil.disk_usage(there).free)


def latents_size(plan: Plan) -> int:
    """Bytes of all pictures' encodings: mean and standard deviation in each of their views."""
    subjects = plan.images_to_encode.values()
    return sum(2 * FLOAT * math.prod(plan.shape.latent_shape(*s.size)) * len(s.augmentations) for s in subjects)


def texts_size(plan: Plan, tokenizer, max_chunks: int) -> int:
    """Bytes of all captions' embeddings, in all their forms."""
    groups = {tuple(subject.captions) for subject in plan.images_to_encode.values()}  # one file each
    captions = [caption for group in groups for caption in group]
    chunks = {caption: count_chunks(tokenizer, caption, max_chunks) for caption in set(captions)}
    width = json.loads((plan.base / "text_encoder" / "config.json").read_text())["hidden_size"]
    return FLOAT * width * tokenizer.model_max_length * sum(chunks[caption] for caption in captions)


def check_space(space: DiskSpace, folder: Path) -> None:
    """WorkError where the run would end in a full disk."""
    if space.needed > space.free:
        raise WorkError(
            f"{folder}: the run will write {space.needed / 1e9:.3g} GB (encodings, checkpoints of "
            f"{space.checkpoint / 1e9:.2g} GB and the result), {space.free / 1e9:.3g} GB are free; make room, name "
            "another --output_dir, or keep fewer with --checkpoints_total_limit"
        )
