"""What a run will write, whether there is room for it, and a reserve, so that a full disk costs no steps."""

import argparse
import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer

from data.buckets import ImageToEncode
from models.folders import FolderLike, ModelShape, count_lora_parameters, count_parameters, list_parts
from models.lora import LORA_TARGETS
from models.text_encoding import chunks_of, count_all_tokens
from runs.checkpoints import complete_checkpoints
from runtime.errors import WorkError
from runtime.files import format_size, size_on_disk

FLOAT, HALF = 4, 2  # bytes
SHARD = 10 * 10**9  # bytes: diffusers splits larger files of weights
RESERVE = ".reserve"
MOST_COUNTED = 2000  # pictures whose captions' tokens are counted
MARGIN = 1 << 20  # bytes of a checkpoint that are not weights, and of the rows before it


@dataclass(frozen=True)
class DiskSpace:
    """In bytes."""

    checkpoint: int  # each
    kept: int  # how many checkpoints there will be at the end
    needed: int  # still: encodings, checkpoints and the result, at the worst moment
    free: int
    result: int = 0
    largest_file: int = 0

    @property
    def reserve(self) -> int:
        return int(self.checkpoint + MARGIN)

    @property
    def line(self) -> str:
        kept = "1 checkpoint" if self.kept == 1 else f"{self.kept} checkpoints"
        return f"{kept} of about {self.checkpoint / 1e9:.2g} GB, {self.free / 1e9:.3g} GB free"


def measure_space(args: argparse.Namespace, folder: Path, base: FolderLike, steps: int, encodings: int) -> DiskSpace:
    """What a run of `steps` on `base` will write into `folder`; `encodings` are the bytes of the encoded data set.

    A checkpoint holds the weights, the optimizer's state and perhaps EMA; the result is a whole pipeline.
    """
    if args.lora_rank:
        trained = count_lora_parameters(base, args.lora_rank, LORA_TARGETS)
        result = largest_part = FLOAT * trained
    else:
        trained = count_parameters(base)
        parts = [FLOAT * count_parameters(base, part) for part in list_parts(base)]
        result, largest_part = sum(parts), max(parts)
    weight = 2 if args.mixed_precision == "pure_bf16" else FLOAT
    state = {"adamw": 2 * weight, "adamw8bit": 2, "adafactor": 0}[args.optimizer]
    checkpoint = trained * (weight + state + FLOAT * args.use_ema)
    written = steps // args.checkpointing_steps
    best = bool(args.validation_split or args.validation_dir)  # kept beside those of the limit
    kept = min(written, (args.checkpoints_total_limit or written) + best)
    at_once = min(written, kept + 1)  # a new one is written before the oldest goes
    remaining = max(0, at_once - len(complete_checkpoints(folder)))
    existing = next(path for path in [folder, *folder.resolve().parents] if path.is_dir())
    needed = encodings + remaining * checkpoint + result
    free = shutil.disk_usage(existing).free + size_on_disk(folder / RESERVE)
    largest_file = max(trained * state, *(min(SHARD, size) for size in (trained * FLOAT, largest_part)))
    return DiskSpace(checkpoint, kept, needed, free, result, largest_file)


def latents_bytes(images: Iterable[ImageToEncode], shape: ModelShape) -> int:
    """Of all encoded pictures: mean and standard deviation of each in each of its augmentations, and its mask."""

    def augmented_bytes(image: ImageToEncode) -> int:
        channels, height, width = shape.latent_shape(*image.size)
        return (2 * FLOAT * channels + HALF * (image.picture.mask is not None)) * height * width

    return sum(augmented_bytes(image) * len(image.augmentations) for image in images)


def texts_bytes(images: Iterable[ImageToEncode], base: FolderLike, tokenizer: CLIPTokenizer, max_chunks: int) -> int:
    """Of all captions' embeddings, in all their variants; of a large data set as a sample of it tells."""
    groups = list(dict.fromkeys(tuple(image.captions) for image in images))  # each is stored once
    sample = groups[:: math.ceil(len(groups) / MOST_COUNTED)]
    captions = [caption for group in sample for caption in group]
    tokens = count_all_tokens(tokenizer, captions)
    chunks = sum(chunks_of(tokenizer, tokens[caption], max_chunks) for caption in captions) * len(groups) / len(sample)
    width = json.loads((base / "unet" / "config.json").read_text())["cross_attention_dim"]
    return math.ceil(HALF * width * tokenizer.model_max_length * chunks)


def check_space(space: DiskSpace, folder: Path) -> None:
    """WorkError where the run would end in a full disk, or at `ulimit -f`."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and space.largest_file > limit:
        raise WorkError(
            f"{folder}: the run will write a file of {format_size(space.largest_file)}, and `ulimit -f` of this shell "
            f"allows {format_size(limit)}; raise it: ulimit -f unlimited"
        )
    if space.needed > space.free:
        raise WorkError(
            f"{folder}: the run will write {space.needed / 1e9:.3g} GB (encodings, checkpoints of "
            f"{space.checkpoint / 1e9:.2g} GB and the result), {space.free / 1e9:.3g} GB are free; make room, name "
            "another --output_dir, or keep fewer with --checkpoints_total_limit"
        )


def hold_reserve(folder: Path, space: DiskSpace) -> None:
    """Takes the room of one checkpoint with an empty file, so that there is one when others have filled the disk.

    Nothing happens where that would leave too little for what the run writes meanwhile and for its result, or where
    the file system cannot give room without writing it.
    """
    path = folder / RESERVE
    release_reserve(folder)
    if shutil.disk_usage(folder).free < space.reserve + space.result + MARGIN:
        return
    try:
        with open(path, "wb") as file:
            _allocate(file.fileno(), space.reserve)
    except (OSError, AttributeError):
        release_reserve(folder)


def _allocate(descriptor: int, size: int) -> None:
    """Linux's fallocate; OSError or AttributeError where there is none. os.posix_fallocate would write instead."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    if fallocate(descriptor, 0, 0, size):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def release_reserve(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)
