"""What a run will do, worked out from arguments, data set and model before anything is loaded, and how it is told."""

import argparse
import importlib.metadata
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from caption_forms import first_sentence
from captions import image_files
from data import Picture, cropped, hash_pictures, read_pictures, training_size
from errors import PACKAGES
from model_defaults import FROM_FLAG, REAL_MODEL, TRAINING_DEFAULTS, guidance_scale_of
from models import ModelShape, count_parameters, find_model, fingerprint_model, read_shape
from prior import prior_batch_size, repeat_prompts
from prompts import count_chunks, count_tokens
from reporting import origins_line
from runs import fingerprint_run, seed_of, shown
from schedule import total_steps, warmup_steps


@dataclass(frozen=True)
class Plan:
    """All that follows from arguments, data and model before a weight is loaded."""

    pictures: list[Picture]
    base: Path
    shape: ModelShape
    height: int
    width: int
    global_batch: int  # samples of the data set in a step, over processes and accumulation
    prior_batch: int  # pictures of the base's own that ride along
    steps: int
    warmup: int
    learning_rate: float
    prior_prompts: list[str]  # one for each of the base's own pictures

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.shape.latent_shape(self.height, self.width)

    @property
    def samples_per_step(self) -> int:
        return self.global_batch + self.prior_batch


def make_plan(args: argparse.Namespace, accelerator: Accelerator) -> Plan:
    """Raises UserError where the data set or the model is not usable."""
    pictures = read_pictures(args.dataset, args.short_captions)
    with accelerator.local_main_process_first():  # one of a node downloads
        base = find_model(
            args.pretrained_model_name_or_path,
            "--pretrained_model_name_or_path",
            args.revision,
            args.variant,
            args.cache_dir,
        )
    shape = read_shape(base)
    height, width = training_size(pictures, args.resolution or shape.native_size, shape.size_multiple)
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps = total_steps(len(pictures), args.repeats, args.epochs, global_batch, args.max_train_steps)
    own_prompts = args.prior_prompts or [first_sentence(picture.captions[0]) for picture in pictures]
    return Plan(
        pictures=pictures,
        base=base,
        shape=shape,
        height=height,
        width=width,
        global_batch=global_batch,
        prior_batch=prior_batch_size(global_batch, args.prior_images),
        steps=steps,
        warmup=warmup_steps(args.lr_warmup_steps, steps),
        learning_rate=args.learning_rate * (global_batch if args.scale_lr else 1),
        prior_prompts=repeat_prompts(own_prompts, args.prior_images),
    )


def describe_run(args: argparse.Namespace, plan: Plan, accelerator: Accelerator, tokenizer) -> dict:
    """What run.json says, at the start of the run."""
    arguments = {name: value for name, value in vars(args).items() if name != "origins"}
    dataset_hash, model_hash = hash_pictures(plan.pictures), fingerprint_model(plan.base)
    # Two things that change the weights and are no arguments: what accelerate was told, and what the model brings.
    told = {"mixed_precision": accelerator.mixed_precision, "prior_guidance_scale": guidance_scale_of(plan.base)}
    fingerprint = fingerprint_run({**arguments, **told}, dataset_hash, model_hash, plan.global_batch, args.seed)
    captions = [caption for picture in plan.pictures for caption in picture.captions]
    return {
        "finished": False,
        "fingerprint": fingerprint,
        "base_model": args.pretrained_model_name_or_path,
        "base_model_hash": model_hash,
        "dataset_hash": dataset_hash,
        "seed": seed_of(args.seed, fingerprint),
        "steps": plan.steps,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "saved_dtype": "float32",
        "sizes": [{"height": plan.height, "width": plan.width, "pictures": len(plan.pictures)}],
        "token_chunks": max(count_chunks(tokenizer, caption, args.max_token_chunks) for caption in captions),
        "max_token_chunks": args.max_token_chunks,
        "example_prompts": example_prompts(plan),
        "arguments": arguments,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def example_prompts(plan: Plan) -> list[str]:
    """The first sentence of the first captions, four at most: what the model can surely be asked for."""
    return list(dict.fromkeys(first_sentence(picture.captions[0]) for picture in plan.pictures))[:4]


def start_table(
    args: argparse.Namespace, plan: Plan, run: dict, accelerator: Accelerator, tokenizer, folder: Path, first_step: int
) -> list[tuple[str, str]]:
    """What will be done, as (what, how) rows."""
    precision = {"no": "fp32"}.get(
        accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast, fp32 weights"
    )
    parameters = count_parameters(plan.base) / 1e6
    return [
        ("model", f"{shown(args.pretrained_model_name_or_path)} (UNet of {parameters:.1f} M parameters)"),
        ("", f"a real one: --pretrained_model_name_or_path {REAL_MODEL}"),
        ("pictures", f"{len(plan.pictures)} in {shown(args.dataset)}{_without_row(args.dataset, plan)}"),
        ("captions", _captions_line(args, plan, tokenizer)),
        ("size", _size_line(plan)),
        ("steps", _steps_line(args, plan, first_step)),
        ("batch", _batch_line(args, plan, accelerator.num_processes)),
        ("learning rate", f"{plan.learning_rate:g}, {args.lr_scheduler}, {plan.warmup} steps of warm-up"),
        ("device", f"{accelerator.device} x {accelerator.num_processes}, {precision}; seed {run['seed']}"),
        ("flags", origins_line(vars(args), args.origins, FROM_FLAG)),
        ("from the model", f"{origins_line(vars(args), args.origins, TRAINING_DEFAULTS)} ({TRAINING_DEFAULTS})"),
        ("output", f"{shown(folder)}, fp32"),
    ]


def _without_row(dataset: Path, plan: Plan) -> str:
    """A warning that names the pictures nobody captioned: they are not trained on."""
    known = {picture.path.resolve() for picture in plan.pictures}
    left_out = [path.name for path in image_files(dataset) if path.resolve() not in known]
    return f"; WITHOUT A CAPTION, left out: {', '.join(left_out)}" if left_out else ""


def _captions_line(args: argparse.Namespace, plan: Plan, tokenizer) -> str:
    tokens = {caption: count_tokens(tokenizer, caption) for picture in plan.pictures for caption in picture.captions}
    room = args.max_token_chunks * (tokenizer.model_max_length - 2)
    cut = [p.path.name for p in plan.pictures if any(tokens[caption] > room for caption in p.captions)]
    line = f"{len(tokens)} with their shorter forms, the longest of {max(tokens.values())} tokens"
    return line + (f"; CUT at {room} tokens: {', '.join(cut)}" if cut else "")


def _size_line(plan: Plan) -> str:
    lost = [cropped(picture.height / picture.width, (plan.height, plan.width)) for picture in plan.pictures]
    line = f"{plan.width} x {plan.height} px, whole pictures; cropped: at most {max(lost):.1%}"
    small = [p.path.name for p in plan.pictures if p.width < plan.width or p.height < plan.height]
    return line + (f"; SMALLER than this and enlarged: {', '.join(small)}" if small else "")


def _steps_line(args: argparse.Namespace, plan: Plan, first_step: int) -> str:
    passes = f"{args.epochs} epochs x {len(plan.pictures)} pictures x {args.repeats} repeats"
    why = "--max_train_steps" if args.max_train_steps else f"{passes} / batch of {plan.global_batch}"
    line = f"{plan.steps} ({why})"
    return line + (f", going on after step {first_step}" if first_step else "")


def _batch_line(args: argparse.Namespace, plan: Plan, processes: int) -> str:
    line = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {processes} processes"
    if plan.prior_batch:
        line += f", and {plan.prior_batch} of the {len(plan.prior_prompts)} pictures that the base draws first"
    return line


def closing_lines(folder: Path, run: dict) -> list[tuple[str, str]]:
    """Where the model is and the command that draws with it, ready to paste."""
    script = shlex.quote(shown(Path(__file__).with_name("inference.py")))
    prompt = shlex.quote(run["example_prompts"][0])
    command = f"python {script} --model {shlex.quote(shown(folder))} --prompt {prompt}"
    return [("the model", shown(folder)), ("draw with it", command)]
