"""The plan of a run: all that follows from the arguments, the data set and the model before a weight is loaded."""

import argparse
import importlib.metadata
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CLIPTokenizer

from bases.finding import find_bases
from bases.one_file import is_one_file
from data.augmentation import NO_AUGMENTATION, Augmentation, list_augmentations
from data.buckets import Bucket, ImageToEncode, Size, choose_sizes, list_buckets
from data.caption_variants import first_sentence
from data.dataset import Picture, hash_dataset, read_pictures
from data.mirroring import why_not_mirrored
from metadata.files import find_metadata_files, pictures_without_row
from metadata.hub_datasets import find_dataset
from metadata.image_files import find_nested_image_files, find_nested_unsupported_files
from metadata.reading import CaptionSources, describe_captions
from models.defaults import guidance_scale_of
from models.folders import ModelFolder, ModelShape, fingerprint_model, read_shape
from models.text_encoding import count_chunks
from runs.records import fingerprint_run, seed_for, without_secrets
from runtime.errors import PACKAGES, UserError
from runtime.processes import run_on_main
from training.samples import DATA, HELD_OUT, keyed_generator


@dataclass(frozen=True)
class Plan:
    """All that follows from arguments, data and model before a weight is loaded."""

    folder: Path  # of the data set
    without_caption: list[str]  # names of pictures in it, and in folders below, that have no row
    unreadable: list[str]  # the same of pictures in a format or under a suffix that is not read
    pictures: list[Picture]
    sizes: list[Size]  # of each picture
    augmentations: list[tuple[Augmentation, ...]]  # of each picture
    held_out: list[Picture]  # to measure the loss on, never trained on
    base: ModelFolder
    unet_base: ModelFolder  # another than `base` with --non_ema_revision
    shape: ModelShape
    global_batch: int  # samples of the data set in a step, over processes and accumulation
    prior_batch: int  # the base's own pictures in a step
    steps: int
    warmup: int
    learning_rate: float
    prior_prompts: list[str]  # one for each of the base's own pictures
    held_out_sizes: list[Size]
    interpolation: str
    caption_sources: CaptionSources = CaptionSources()

    @property
    def buckets(self) -> list[Bucket]:
        return list_buckets(self.pictures, self.sizes)

    @property
    def main_size(self) -> Size:
        """What most pictures are trained at."""
        return self.buckets[0].size

    @property
    def largest_size(self) -> Size:
        return max([*self.sizes, *self.held_out_sizes], key=lambda size: size[0] * size[1])

    @property
    def samples_per_step(self) -> int:
        return self.global_batch + self.prior_batch

    @property
    def images_to_encode(self) -> dict[tuple[str, int], ImageToEncode]:
        """Everything that is encoded, by stream and number."""
        data = zip(self.pictures, self.sizes, self.augmentations, strict=True)
        held_out = ((p, size, NO_AUGMENTATION) for p, size in zip(self.held_out, self.held_out_sizes, strict=True))
        return {
            (stream, index): ImageToEncode(*what, self.interpolation)
            for stream, subjects in ((DATA, data), (HELD_OUT, held_out))
            for index, what in enumerate(subjects)
        }


def make_plan(args: argparse.Namespace, accelerator: Accelerator) -> Plan:
    """Raises UserError where the data set or the model is not usable."""
    with accelerator.local_main_process_first():  # one of a node downloads
        folder = find_dataset(args)
        base, unet_base = find_bases(args)
    files = find_metadata_files(folder, leave_out=args.validation_dir, named=args.metadata_file)
    pictures = read_pictures(folder, args.short_captions, args.caption_column, args.trigger, files)
    captions = [(picture.path, picture.row_captions) for picture in pictures]
    caption_sources = run_on_main(
        accelerator, lambda: describe_captions(folder, files, captions, leave_out=args.validation_dir)
    )
    known = {picture.path for picture in pictures}
    without_caption = [path for path in find_nested_image_files(folder) if path not in known]
    without_caption += pictures_without_row(files, known)
    unreadable = [path for path in find_nested_unsupported_files(folder) if path not in known]
    pictures, held_out = hold_out(args, pictures)
    shape = read_shape(base)
    sizing = (args.resolution or shape.native_size, shape.size_multiple, args.center_crop)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps = total_steps(len(pictures), args.repeats, args.epochs, global_batch, args.max_train_steps)
    own_prompts = args.prior_prompts or [first_sentence(picture.base_caption) for picture in pictures]
    return Plan(
        folder=folder,
        without_caption=[str(path.relative_to(folder)) for path in without_caption],
        caption_sources=caption_sources,
        unreadable=[str(path.relative_to(folder)) for path in unreadable],
        pictures=pictures,
        sizes=choose_sizes(pictures, *sizing),
        augmentations=[
            list_augmentations(args.random_flip and not unmirrored_word(p), args.random_affine) for p in pictures
        ],
        held_out=held_out,
        held_out_sizes=choose_sizes(held_out, *sizing),
        base=base,
        unet_base=unet_base,
        shape=shape,
        global_batch=global_batch,
        prior_batch=prior_batch_size(global_batch, args.prior_images),
        steps=steps,
        warmup=warmup_steps(args.lr_warmup_steps, steps),
        learning_rate=args.learning_rate * (global_batch if args.scale_lr else 1),
        prior_prompts=repeat_prompts(own_prompts, args.prior_images),
        interpolation=args.image_interpolation_mode,
    )


def total_steps(pictures: int, repeats: int, epochs: int, global_batch: int, max_train_steps: int | None) -> int:
    """Steps of a run: enough that every picture is seen `epochs * repeats` times, the last batch filled up.

    Batches flow over the border between epochs, so a data set smaller than the batch still trains with whole batches.
    `max_train_steps` overrides the epochs, as in diffusers' script.
    """
    return max_train_steps or math.ceil(epochs * repeats * pictures / global_batch)


def warmup_steps(asked: int | None, steps: int) -> int:
    """`asked`, else a twentieth of the run and at most 500: a run of 75 steps must not spend them all warming up."""
    return min(500, steps // 20) if asked is None else asked


def prior_batch_size(global_batch: int, prior_images: int) -> int:
    """How many of the base's pictures join `global_batch` of the data set: half as many, rounded up."""
    return (global_batch + 1) // 2 if prior_images else 0


def repeat_prompts(prompts: Sequence[str], prior_images: int) -> list[str]:
    """The prompt of each of the base's pictures, in turn."""
    return [prompts[index % len(prompts)] for index in range(prior_images)]


def picture_names(plan: Plan, pictures: Sequence[int]) -> list[str]:
    return [plan.pictures[picture].path.name for picture in pictures]


def unmirrored_word(picture: Picture) -> str | None:
    """The word in a caption for which the picture must not be mirrored."""
    return next(filter(None, map(why_not_mirrored, picture.captions)), None)


def hold_out(args: argparse.Namespace, pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(trained on, held out), in the data set's order; which ones follows from --seed, or is always the same."""
    shuffled = torch.randperm(len(pictures), generator=keyed_generator(args.seed or 0, "choice of pictures")).tolist()
    chosen = sorted(shuffled[: args.max_train_samples])
    count = round(args.validation_split * len(chosen))
    if args.validation_split and not 0 < count < len(chosen):
        raise UserError(
            f"--validation_split {args.validation_split:g}: of {len(chosen)} pictures that would hold out {count}; "
            "name other pictures with --validation_dir, or leave it out"
        )
    out = set(shuffled[:count])
    trained = [pictures[i] for i in chosen if i not in out]
    if args.validation_dir:
        return trained, read_pictures(args.validation_dir, False, args.caption_column, args.trigger)
    return trained, [pictures[i] for i in sorted(out)]


def describe_run(
    args: argparse.Namespace, plan: Plan, accelerator: Accelerator, tokenizer: CLIPTokenizer, precision: str
) -> dict:
    """What run.json says, at the start of the run."""
    arguments = without_secrets({name: value for name, value in vars(args).items() if name != "origins"})
    captions = [caption for picture in plan.pictures for caption in picture.captions]
    run = {
        "finished": False,
        "base_model": base_name(args.pretrained_model_name_or_path),
        "base_model_hash": fingerprint_model(plan.base),
        "dataset_folder": str(plan.folder.absolute()),
        "dataset_hash": hash_dataset(plan.pictures),
        "seed_asked": args.seed,
        "global_batch": plan.global_batch,
        "prior_guidance_scale": guidance_scale_of(plan.base),
        "steps": plan.steps,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        # The bits that a CPU computes depend on it.
        "cpu_threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
        "mixed_precision": precision,
        "saved_dtype": "float32",
        "trained": f"LoRA of rank {args.lora_rank}" if args.lora_rank else "UNet",
        "sizes": [
            {"height": bucket.size[0], "width": bucket.size[1], "pictures": bucket.pictures} for bucket in plan.buckets
        ],
        "token_chunks": max(count_chunks(tokenizer, caption, args.max_token_chunks) for caption in captions),
        "max_token_chunks": args.max_token_chunks,
        "trigger": args.trigger,
        "example_prompts": example_prompts(plan, args.short_captions),
        "arguments": arguments,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    fingerprint = fingerprint_run(run)
    return {**run, "fingerprint": fingerprint, "seed": seed_for(args.seed, fingerprint)}


def base_name(name: str) -> str:
    """A hub id as it is, a folder or file so that it is found from anywhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() or is_one_file(path) else name


def example_prompts(plan: Plan, short_captions: bool) -> list[str]:
    """Prompts that the result can be expected to follow: short forms of the first caption, where it is trained on
    such, and three captions."""
    short = plan.pictures[0].short_prompts if short_captions else []
    return list(dict.fromkeys(short + [picture.captions[0] for picture in plan.pictures[:3]]))
