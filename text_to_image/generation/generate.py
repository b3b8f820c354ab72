"""Prompts and seeds → pictures, images.jsonl and a contact sheet: what inference.py does once its flags are read."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState

from data.images import save_image
from generation.contact_sheet import make_contact_sheet
from generation.foreign_prompts import syntax_note
from generation.gallery import PAGE_FILE
from generation.image_generator import ImageGenerator, load_samplers
from generation.image_rows import SHEET_FILE
from generation.output_files import OutputWriter, is_generated, prepare_folder
from generation.planned_images import GeneratedBatch, GenerationSettings, PlannedImage
from generation.weights import GenerationWeights, find_weights, trigger_warning
from models.compiling import check_compiler
from models.defaults import REAL_MODEL
from models.folders import ModelShape, has_safety_checker, read_index, read_shape
from models.loading import quiet_libraries
from models.sampling import guidance_scale_of
from runtime.devices import choose_device
from runtime.errors import escape_control_chars
from runtime.paths import display_path, read_only_note
from runtime.processes import disable_unsupported_p2p, warn_of_single_process
from runtime.progress import progress_bar
from runtime.stopping import StopSignals

MAX_TOKEN_CHUNKS = 3  # for models that were not trained here
MAX_WAIT = timedelta(days=7)  # for the other processes at the end: their shares may take very different times


def generate(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Generates what `args` ask for; several processes share the pictures, and only the main one prints.

    Raises UserError where model, size or prompts cannot be used, WorkError where memory or disk do not suffice.
    """
    with generating_processes() as state:
        weights = find_weights(
            args.model, args.checkpoint, args.lora, args.lora_scale, args.tokenizer, args.allow_pickle
        )
        files = generate_with(args, [weights], stop or StopSignals(), state)
        if state.is_main_process:
            print_end(args.output_dir, files, write_contact_sheet(weights, args.output_dir, files))


@contextlib.contextmanager
def generating_processes() -> Iterator[PartialState]:
    """The processes that share the work; in the block only the main one prints."""
    quiet_libraries()
    disable_unsupported_p2p()
    state = PartialState(cpu=choose_device().type == "cpu", timeout=MAX_WAIT)
    warn_of_single_process(state.num_processes)
    with contextlib.redirect_stdout(sys.stdout if state.is_main_process else None):
        yield state


def generate_with(
    args: argparse.Namespace, models: Sequence[GenerationWeights], stop: StopSignals, state: PartialState
) -> dict[PlannedImage, str]:
    """Generates every picture with each of `models`, which differ in the UNet alone.

    Returns {image: its file's name} on the main process, on others nothing. Raises as `generate`.
    """
    # What the user got wrong is refused here, before weights are loaded:
    plans = plan_for_models(args, models)
    samplers = load_samplers(models[0], plans[0])
    check_compiler(args.compile)
    prepare_folder(args.output_dir)

    plan = list(chain.from_iterable(plans))
    missing = missing_images(args, plans)
    print_start(args, models, plan, len(plan) - sum(map(len, missing)))
    state.wait_for_everyone()  # all must have looked before one of them writes a picture

    writer = OutputWriter(args.output_dir, plan, args.write_metadata, state.is_main_process)
    shares = [share[state.process_index :: state.num_processes] for share in missing]
    work = [(weights, share) for weights, share in zip(models, shares, strict=True) if share]
    if work:
        everything = [planned for _, share in work for planned in share]
        generator = ImageGenerator(args, work[0][0], samplers, state.device, everything)
        save_batches(generate_batches(generator, work), len(everything), writer, stop)
    state.wait_for_everyone()
    return writer.finish() if writer.is_main else {}


def missing_images(args: argparse.Namespace, plans: Sequence[Sequence[PlannedImage]]) -> list[list[PlannedImage]]:
    """What is to be generated of each plan; a picture of two models with the same weights once."""
    missing: list[list[PlannedImage]] = []
    planned: set[str] = set()
    for plan in plans:
        others = [image for image in plan if image.file_name not in planned]
        planned |= {image.file_name for image in others}
        missing.append([image for image in others if not (args.resume and is_generated(args.output_dir, image))])
    return missing


def generate_batches(
    generator: ImageGenerator, work: Sequence[tuple[GenerationWeights, Sequence[PlannedImage]]]
) -> Iterator[GeneratedBatch]:
    """Each share with its model, one UNet after the other; `generator` has the first."""
    for number, (weights, share) in enumerate(work):
        if number:
            generator.load_unet(weights)
        yield from generator.generate(share)


def save_batches(batches: Iterable[GeneratedBatch], total: int, writer: OutputWriter, stop: StopSignals) -> None:
    """Saves `total` pictures, this process's share, as they are generated."""
    done = 0
    with writer, progress_bar(total=total, desc="generating", unit="picture", disable=not writer.is_main) as bar:
        for batch in batches:
            writer.add(batch)
            bar.update(len(batch.images))
            done += len(batch.images)
            stop.note_saved(f"after {done} of {total} pictures; --resume generates the rest into {writer.folder}")


# --- the plan -------------------------------------------------------------------------------------------------------


def plan_images(args: argparse.Namespace, weights: GenerationWeights, shape: ModelShape) -> list[PlannedImage]:
    """Every request with each of its seeds, each picture once. Says where a size had to be rounded."""
    model_hash, title = weights.fingerprint(), Path(args.model).name
    requests = [(request, request.merge_flags(args)) for request in args.requests]
    asked_sizes = dict.fromkeys((flags.height, flags.width) for _, flags in requests)
    sizes = {asked: choose_size(*asked, weights.run, shape) for asked in asked_sizes}
    images = []
    for request, flags in requests:
        settings = _make_settings(flags, weights, sizes[flags.height, flags.width])
        for seed in range(flags.seed, flags.seed + flags.num_images):
            images.append(
                PlannedImage(request.prompt, seed, settings, model_hash, title, args.format, weights.checkpoint)
            )
    return list({image.file_name: image for image in images}.values())


def plan_for_models(args: argparse.Namespace, models: Sequence[GenerationWeights]) -> list[list[PlannedImage]]:
    """The same pictures with each of `models`, which have one shape and one run."""
    plan = plan_images(args, models[0], read_shape(models[0].base))
    return [plan, *(_with_model(plan, weights) for weights in models[1:])]


def _with_model(plan: Sequence[PlannedImage], weights: GenerationWeights) -> list[PlannedImage]:
    changes: dict[str, Any] = {"model_hash": weights.fingerprint(), "checkpoint": weights.checkpoint}
    settings = [replace(planned.settings, model=weights.recorded_name) for planned in plan]
    return [replace(planned, settings=own, **changes) for planned, own in zip(plan, settings, strict=True)]


def _make_settings(flags: argparse.Namespace, weights: GenerationWeights, size: tuple[int, int]) -> GenerationSettings:
    height, width = size
    return GenerationSettings(
        steps=flags.steps,
        scheduler=flags.scheduler,
        guidance_scale=guidance_scale_of(weights.base) if flags.guidance_scale is None else flags.guidance_scale,
        guidance_rescale=flags.guidance_rescale,
        negative_prompt=flags.negative_prompt,
        height=height,
        width=width,
        token_chunks=weights.run.get("max_token_chunks", MAX_TOKEN_CHUNKS),
        dtype=flags.dtype or ("fp32" if choose_device().type == "cpu" else "fp16"),
        safety_checker=flags.safety_checker and has_safety_checker(weights.base),
        model=weights.recorded_name,
    )


def choose_size(height: int | None, width: int | None, run: dict[str, Any], shape: ModelShape) -> tuple[int, int]:
    """(height, width) in pixels: as asked, else the size that the run trained on most, else the model's own.

    Both are rounded to what the model can generate, and a line says so.
    """
    trained = run.get("sizes") or [{"height": shape.native_size, "width": shape.native_size, "pictures": 0}]
    usual = max(trained, key=lambda size: size["pictures"])
    asked = height or usual["height"], width or usual["width"]
    multiple = shape.size_multiple
    rounded_height, rounded_width = (max(1, round(side / multiple)) * multiple for side in asked)
    if (rounded_height, rounded_width) != asked:
        print(
            f"{asked[1]} x {asked[0]} px becomes {rounded_width} x {rounded_height}: "
            f"this model's sides are multiples of {multiple}"
        )
    return rounded_height, rounded_width


def write_contact_sheet(weights: GenerationWeights, folder: Path, files: Mapping[PlannedImage, str]) -> Path:
    captions = [(planned.prompt, planned.seed) for planned in files]
    sheet = make_contact_sheet([folder / name for name in files.values()], captions, weights.recorded_name)
    return save_image(sheet, folder / SHEET_FILE)


# --- what is printed ------------------------------------------------------------------------------------------------


def print_start(
    args: argparse.Namespace, models: Sequence[GenerationWeights], plan: Sequence[PlannedImage], existing: int
) -> None:
    weights = models[0]
    already = f", {existing} of them there already" if existing else ""
    another = "" if args.model_named else f" (another: --model {REAL_MODEL})"
    names = ", ".join(str(weights.checkpoint) for weights in models)
    model = f"{display_path(weights.base)}, {names}" if len(models) > 1 else weights.describe()
    print(f"{len(plan)} pictures{already}; model: {model}{another}", flush=True)
    if args.safety_checker and "safety_checker" in read_index(weights.base) and not has_safety_checker(weights.base):
        print("NOT CHECKED: the model's safety_checker or its feature_extractor is missing", flush=True)
    prompts = [request.prompt for request in args.requests]
    negative_prompts = [args.negative_prompt, *(request.negative_prompt or "" for request in args.requests)]
    notes = [*args.prompt_notes, syntax_note([*prompts, *negative_prompts])]
    if note := read_only_note(args.output_dir):
        notes.append(f"the pictures go to {args.output_dir}, {note}")
    for line in filter(None, [*notes, weights.schedule_note, trigger_warning(weights, prompts)]):
        print(escape_control_chars(line), flush=True)


def print_end(folder: Path, files: Mapping[PlannedImage, str], sheet: Path) -> None:
    if withheld := [name for planned, name in files.items() if name != planned.file_name]:
        print(f"{len(withheld)} withheld by the model's safety checker, black here (--no_safety_checker):")
        print("  " + "\n  ".join(withheld))
    print(f"{len(files)} pictures in {display_path(folder)}, all of them in {display_path(sheet)}")
    print(f"every picture with its settings: {display_path(folder / PAGE_FILE)}")
