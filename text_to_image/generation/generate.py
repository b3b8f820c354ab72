"""Prompts and seeds → picture files, images.jsonl and a contact sheet: `generate(args)` is the whole of it."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from data.images import save_image
from generation.contact_sheet import make_contact_sheet
from generation.image_generator import ImageGenerator, load_samplers
from generation.output_files import SHEET_FILE, OutputWriter, PlannedImage, found, is_intact_image, prepare_folder
from generation.request_list import KEYS, GenerationRequest
from generation.safety_checker import has_checker
from generation.weights import GenerationWeights, find_weights, missing_trigger
from models.defaults import REAL_MODEL
from models.folders import ModelShape, read_shape
from models.loading import quiet_libraries
from runtime.devices import choose_device
from runtime.errors import UserError, escape_control_chars
from runtime.paths import REPOSITORY, display_path
from runtime.processes import disable_unsupported_p2p
from runtime.progress import progress_bar
from runtime.stopping import StopSignals

MAX_TOKEN_CHUNKS = 3
PATIENCE = timedelta(days=7)  # that a process waits for the others at the end: shares may take unlike times


def generate(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Draws what `args` ask for. UserError where model, size or prompts are not usable."""
    quiet_libraries()
    disable_unsupported_p2p()
    state = PartialState(cpu=choose_device().type == "cpu", timeout=PATIENCE)
    with contextlib.redirect_stdout(sys.stdout if state.is_main_process else None):
        _generate(args, stop or StopSignals(), state)


def _generate(args: argparse.Namespace, stop: StopSignals, state: PartialState) -> None:
    source = find_weights(args.model, args.checkpoint, args.lora, args.lora_scale)
    plan = plan_drawings(args, source, read_shape(source.base))
    samplers = load_samplers(source, plan)
    check_compiler(args.compile)

    # What there is, and what is still to be drawn: several processes share it, before the first of them draws.
    prepare_folder(args.output_dir)
    missing = [drawing for drawing in plan if not (args.resume and is_there(args.output_dir, drawing))]
    say_start(args, source, plan, len(plan) - len(missing))
    state.wait_for_everyone()

    # Draw:
    folder = OutputWriter(args.output_dir, plan, args.write_metadata, state.is_main_process)
    if own := missing[state.process_index :: state.num_processes]:
        painter, drawn = ImageGenerator(args, source, samplers, state.device, own), 0
        with folder, progress_bar(total=len(own), desc="drawing", unit="picture", disable=not folder.is_main) as bar:
            for batch, images, withheld in painter.draw(own):
                folder.add(batch, images, withheld)
                bar.update(len(batch))
                drawn += len(batch)
                stop.note_saved(
                    f"after {drawn} of {len(own)} pictures; --resume draws the rest into {args.output_dir}"
                )

    # What all of them have drawn:
    state.wait_for_everyone()
    if folder.is_main:
        finish(args, source, folder)


def is_there(folder: Path, drawing: PlannedImage) -> bool:
    """Whether it is drawn, whole, as a picture or as one that was withheld."""
    name = found(folder, drawing)
    return name is not None and is_intact_image(folder / name)


def check_compiler(wanted: bool) -> None:
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UserError("--compile needs a C compiler (cc, gcc or clang) and there is none; leave it out")


def plan_drawings(args: argparse.Namespace, source: GenerationWeights, shape: ModelShape) -> list[PlannedImage]:
    """Every prompt with every seed, each picture once."""
    model_hash, name, title = source.fingerprint(), recorded_name(args, source), Path(args.model).name
    chunks, wishes = source.run.get("max_token_chunks", MAX_TOKEN_CHUNKS), wishes_of(args)
    sizes = {(w.height, w.width): picture_size(w.height, w.width, source.run, shape) for w in wishes}
    drawings = []
    for wish in wishes:
        height, width = sizes[wish.height, wish.width]
        settings = {
            "steps": wish.steps,
            "scheduler": wish.scheduler,
            "guidance": wish.guidance_scale,
            "guidance_rescale": wish.guidance_rescale,
            "negative_prompt": wish.negative_prompt,
            "height": height,
            "width": width,
            "token_chunks": chunks,
            "dtype": args.dtype or ("fp32" if choose_device().type == "cpu" else "fp16"),
            "safety_checker": args.safety_checker and has_checker(source.base),
            "model": name,
        }
        seeds = range(wish.seed, wish.seed + wish.num_images)
        drawings += [PlannedImage(wish.prompt, seed, settings, model_hash, title, args.format) for seed in seeds]
    return list({drawing.file_name: drawing for drawing in drawings}.values())


def wishes_of(args: argparse.Namespace) -> list[GenerationRequest]:
    """The prompts with all that their rows leave open filled in from the flags."""
    flags = {name: getattr(args, name) for name in KEYS}
    return [
        GenerationRequest(
            w.prompt, **{name: value if (own := getattr(w, name)) is None else own for name, value in flags.items()}
        )
        for w in args.wishes
    ]


def recorded_name(args: argparse.Namespace, source: GenerationWeights) -> str:
    """How a model is recorded: a folder of this repository without the place where the repository happens to be."""
    path = Path(args.model).expanduser().resolve()
    inside = path.is_dir() and path.is_relative_to(REPOSITORY)
    name = path.relative_to(REPOSITORY).as_posix() if inside else args.model
    if source.unet != source.base:
        name += f"/{source.unet.name}/{source.subfolder}"
    return name + "".join(f" + {path.parent.name}/{path.name} at {scale:g}" for path, scale in source.loras)


def picture_size(height: int | None, width: int | None, run: dict, shape: ModelShape) -> tuple[int, int]:
    """(height, width): as asked, else the size most trained on, else the model's own; says where it rounds."""
    sizes = run.get("sizes") or [{"height": shape.native_size, "width": shape.native_size, "pictures": 0}]
    usual = max(sizes, key=lambda size: size["pictures"])
    asked = height or usual["height"], width or usual["width"]
    rounded = tuple(max(1, round(side / shape.size_multiple)) * shape.size_multiple for side in asked)
    if rounded != asked:
        print(
            f"{asked[1]} x {asked[0]} px becomes {rounded[1]} x {rounded[0]}: "
            f"this model's sides are multiples of {shape.size_multiple}"
        )
    return rounded


def say_start(args: argparse.Namespace, source: GenerationWeights, plan: Sequence[PlannedImage], there: int) -> None:
    already = f", {there} of them there already" if there else ""
    print(f"{len(plan)} pictures{already}, drawn by {source.told()} (another: --model {REAL_MODEL})", flush=True)
    if line := missing_trigger(source, [wish.prompt for wish in args.wishes]):
        print(escape_control_chars(line), flush=True)


def finish(args: argparse.Namespace, source: GenerationWeights, folder: OutputWriter) -> None:
    """The lists and the contact sheet of all that was asked for, and the last lines."""
    drawn = folder.list_pictures()
    captions = [(drawing.prompt, drawing.seed) for drawing in drawn]
    sheet = make_contact_sheet([folder.path / name for name in drawn.values()], captions, recorded_name(args, source))
    path = save_image(sheet, folder.path / SHEET_FILE)
    if withheld := [name for drawing, name in drawn.items() if name != drawing.file_name]:
        print(f"{len(withheld)} withheld by the model's safety checker, black here (--no_safety_checker):")
        print("  " + "\n  ".join(withheld))
    print(f"{len(drawn)} pictures in {display_path(folder.path)}, all of them in {display_path(path)}")
