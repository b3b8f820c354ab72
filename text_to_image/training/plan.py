"""The plan of a run: all that follows from the arguments, the data set and the model before a weight is loaded."""

import argparse
import importlib.metadata
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CLIPTokenizer

from bases.finding import find_bases
from bases.one_file import is_one_file
from data.augmentation import NO_AUGMENTATION, Augmentation, list_augmentations
from data.buckets import Bucket, ImageToEncode, Size, choose_sizes, list_buckets
from data.caption_variants import first_sentence
from data.captioned_folders import folder_shares, read_dataset
from data.dataset import Columns, Picture, hash_dataset, read_pictures, read_tags, with_masks
from data.file_facts import FileFacts
from data.masks import Mask, refuse_masks, white_share
from data.mirroring import why_not_mirrored
from data.random_numbers import keyed_generator
from data.tags import TagSettings
from metadata.hub_datasets import find_datasets
from metadata.picture_names import distinct_names
from metadata.reading import CaptionSources
from models.defaults import FROM_SCRIPT, XL_LEARNING_RATE
from models.folders import ModelFolder, ModelShape, fingerprint_model, is_xl, read_shape
from models.loading import load_tokenizer
from models.sampling import guidance_scale_of
from models.text_encoding import chunks_of, count_all_tokens
from runs.records import find_file_facts, fingerprint_run, seed_for, without_secrets
from runtime.errors import PACKAGES, UserError
from runtime.files import hash_key
from training.samples import DATA, HELD_OUT, epoch_length


@dataclass(frozen=True)
class Plan:
    """All that follows from arguments, data and model before a weight is loaded."""

    folders: list[Path]  # of the data set
    without_caption: list[str]  # names of pictures in them, and in folders below, that have no row
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
    epoch_samples: int  # of the data set, in an epoch
    steps: int
    warmup: int
    learning_rate: float
    prior_prompts: list[str]  # one for each of the base's own pictures
    held_out_sizes: list[Size]
    interpolation: str
    caption_sources: CaptionSources = CaptionSources()
    facts: FileFacts = field(default_factory=FileFacts)  # of files that were read, for the next start
    white_shares: tuple[float, ...] = ()  # of the pictures trained on that have a mask: how much of it is white

    @property
    def buckets(self) -> list[Bucket]:
        return list_buckets(self.pictures, self.sizes)

    @cached_property
    def names(self) -> dict[Path, str]:
        """What each picture is called in messages: its file name, with folders where others have the same."""
        return distinct_names(picture.path for picture in (*self.pictures, *self.held_out))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return load_tokenizer(self.base)

    @cached_property
    def caption_tokens(self) -> dict[str, int]:
        """Of each whole caption of the pictures trained on, and of the held-out ones' first; shorter forms have no
        more."""
        captions = [caption for picture in self.pictures for caption in picture.whole_captions]
        captions += [picture.captions[0] for picture in self.held_out]
        captions = list(dict.fromkeys(captions))
        key = hash_key("tokens", fingerprint_model(self.base, ("tokenizer",)), *captions)
        # Of 100,000 captions it takes longer than all else that is done with them.
        counts = self.facts.following("tokens", key, lambda: [*count_all_tokens(self.tokenizer, captions).values()])
        return dict(zip(captions, counts, strict=True))

    def names_of(self, pictures: Sequence[int]) -> list[str]:
        return [self.names[self.pictures[picture].path] for picture in pictures]

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

    @cached_property
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
        folders = find_datasets(args)
        base, unet_base = find_bases(args)
    facts = FileFacts.load(find_file_facts(args))
    dataset = read_dataset(args, accelerator, folders, facts)
    pictures, held_out = hold_out(args, dataset.pictures, facts)
    pictures = arrange_tags(args, pictures)
    shape = read_shape(base)
    sizing = (args.resolution or shape.native_size, shape.size_multiple, args.center_crop)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    epoch_samples = epoch_length([picture.repeats for picture in pictures]) * args.repeats
    steps = args.max_train_steps or total_steps(args.samples or args.epochs * epoch_samples, global_batch)
    own_prompts = args.prior_prompts or [first_sentence(picture.base_caption) for picture in pictures]
    plan = Plan(
        folders=dataset.folders,
        without_caption=dataset.without_caption,
        caption_sources=dataset.caption_sources,
        unreadable=dataset.unreadable,
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
        epoch_samples=epoch_samples,
        steps=steps,
        warmup=warmup_steps(args.lr_warmup_steps, steps),
        learning_rate=choose_learning_rate(args, base) * (global_batch if args.scale_lr else 1),
        prior_prompts=repeat_prompts(own_prompts, args.prior_images),
        interpolation=args.image_interpolation_mode,
        facts=facts,
    )
    return replace(plan, white_shares=measure_masks(args, plan))


def measure_masks(args: argparse.Namespace, plan: Plan) -> tuple[float, ...]:
    """How much is white of each mask that is trained with, 0 to 1.

    Raises UserError that lists every mask that cannot be used, and where a flag is about masks and there are none.
    """
    images = plan.images_to_encode.items()
    masked = [(stream, image.picture.mask, image) for (stream, _), image in images if image.picture.mask]
    _check_mask_flags(args, plan.folders, [mask for _, mask, _ in masked])
    shares, faults = [], []
    for stream, mask, image in masked:
        picture_size = image.picture.width, image.picture.height
        try:
            share = white_share(mask, picture_size, image.size, plan.shape.latent_shape(*image.size)[1:])
            shares += [share] if stream == DATA else []
        except ValueError as fault:
            faults.append(str(fault))
    refuse_masks(faults)
    return tuple(shares)


def _check_mask_flags(args: argparse.Namespace, folders: Sequence[Path], masks: Sequence[Mask]) -> None:
    transparent = any(mask.from_alpha for mask in masks)
    for flag, what, there in (("mask_from_alpha", "transparency", transparent), ("unmasked_weight", "a mask", masks)):
        if getattr(args, flag) and not there:
            raise UserError(f"--{flag}: no picture in {', '.join(map(str, folders))} has {what}; leave the flag out")


def choose_learning_rate(args: argparse.Namespace, base: ModelFolder) -> float:
    """--learning_rate; where nobody names one, what is usual for the kind of model."""
    by_default = args.origins["learning_rate"] == FROM_SCRIPT
    return XL_LEARNING_RATE if by_default and is_xl(base) and not args.lora_rank else args.learning_rate


def total_steps(samples: int, global_batch: int) -> int:
    """Steps that see this many samples of the data set, the last batch filled up.

    Batches flow over the border between epochs, so a data set smaller than the batch still trains with whole batches.
    """
    return math.ceil(samples / global_batch)


def warmup_steps(asked: int | None, steps: int) -> int:
    """`asked`, else a twentieth of the run and at most 500: a run of 75 steps must not spend them all warming up."""
    return min(500, steps // 20) if asked is None else asked


def prior_batch_size(global_batch: int, prior_images: int) -> int:
    """How many of the base's pictures join `global_batch` of the data set: half as many, rounded up."""
    return (global_batch + 1) // 2 if prior_images else 0


def repeat_prompts(prompts: Sequence[str], prior_images: int) -> list[str]:
    """The prompt of each of the base's pictures, in turn."""
    return [prompts[index % len(prompts)] for index in range(prior_images)]


def unmirrored_word(picture: Picture) -> str | None:
    """The word in a caption for which the picture must not be mirrored."""
    return next(filter(None, map(why_not_mirrored, picture.captions)), None)


def hold_out(
    args: argparse.Namespace, pictures: Sequence[Picture], facts: FileFacts | None = None
) -> tuple[list[Picture], list[Picture]]:
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
        columns = Columns(args.caption_column, args.image_column)
        held_out = read_pictures(args.validation_dir, False, columns, args.trigger, facts=facts)
        if both := {picture.path for picture in held_out} & {picture.path for picture in trained}:
            raise UserError(
                f"--validation_dir {args.validation_dir}: {min(both)} is in --dataset, too, and would be trained on; "
                "move one of the two, or name the files of --dataset"
            )
        return trained, with_masks(args.validation_dir, held_out, args.mask_from_alpha)
    return trained, [pictures[i] for i in sorted(out)]


def arrange_tags(args: argparse.Namespace, pictures: list[Picture]) -> list[Picture]:
    """The pictures, their lists of tags in several orders where that is asked for. The orders follow from --seed, or
    are always the same. UserError where no caption is a list of tags."""
    if not args.shuffle_tags and not args.tag_dropout:
        return pictures
    settings = TagSettings(args.shuffle_tags, args.keep_tags, args.tag_dropout, args.seed or 0)
    arranged = [read_tags(picture, settings, bool(args.short_captions)) for picture in pictures]
    if not any(picture.as_written for picture in arranged):
        raise UserError(
            f"--{'shuffle_tags' if args.shuffle_tags else 'tag_dropout'}: no caption is a list of tags, such as "
            "'denim jeans, blue, folded'; the first is "
            f"{textwrap.shorten(pictures[0].row_captions[0], 60, placeholder=' ...')!r}"
        )
    return arranged


def describe_run(
    args: argparse.Namespace, plan: Plan, accelerator: Accelerator, tokenizer: CLIPTokenizer, precision: str
) -> dict:
    """What run.json says, at the start of the run."""
    arguments = without_secrets({name: value for name, value in vars(args).items() if name != "origins"})
    arguments["learning_rate"] = choose_learning_rate(args, plan.base)
    tokens = max(plan.caption_tokens[caption] for picture in plan.pictures for caption in picture.whole_captions)
    run = {
        "finished": False,
        "base_model": base_name(args.pretrained_model_name_or_path),
        "base_model_hash": fingerprint_model(plan.base),
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
        "text_dtype": "float16" if args.cache else "float32",
        "saved_dtype": "float32",
        "trained": f"LoRA of rank {args.lora_rank}" if args.lora_rank else "UNet",
        "folders": [
            {"folder": str(folder.absolute()), "pictures": count, "share": round(share, 4)}
            for folder, (count, share) in folder_shares(plan.pictures).items()
        ],
        "sizes": [
            {"height": bucket.size[0], "width": bucket.size[1], "pictures": bucket.pictures} for bucket in plan.buckets
        ],
        "token_chunks": chunks_of(tokenizer, tokens, args.max_token_chunks),
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
