"""Prompts and seeds → picture files, images.jsonl and a contact sheet: `generate(args)` is the whole of it."""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from contact_sheet import make_contact_sheet
from devices import choose_device
from errors import WorkError, harmless, is_out_of_memory
from model_defaults import REAL_MODEL
from model_folders import ModelShape, read_shape
from models import choose_attention, load_tokenizer, load_vae, quiet_libraries
from picture_files import (
    SHEET_FILE,
    Drawing,
    is_whole,
    prepare_folder,
    save_drawing,
    save_image,
    write_metadata,
    write_rows,
)
from prompt_list import Wish
from prompts import count_tokens, encode_prompt
from reporting import progress
from runs import shown
from safety import NoChecker, SafetyChecker, has_checker
from sampling import decode_latents, draw_latents, initial_noise, seeded
from sources import Source, find_source, load_source_text_encoder, load_source_unet, missing_trigger, sampler_of
from stopping import StopSignals

MAX_TOKEN_CHUNKS = 3
AUTO_BATCH = {"cuda": 16, "cpu": 4}  # on a CPU larger ones are no faster
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def generate(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Draws what `args` ask for. UserError where model, size or prompts are not usable."""
    quiet_libraries()
    state = PartialState(cpu=choose_device().type == "cpu")
    with contextlib.redirect_stdout(sys.stdout if state.is_main_process else None):
        _generate(args, stop or StopSignals(), state)


def _generate(args: argparse.Namespace, stop: StopSignals, state: PartialState) -> None:
    source = find_source(args.model, args.checkpoint, args.lora, args.lora_scale)
    plan = plan_drawings(args, source, read_shape(source.base))

    # What there is, and what is still to be drawn: several processes share it, before the first of them draws.
    prepare_folder(args.output_dir)
    missing = [d for d in plan if not (args.resume and is_whole(args.output_dir / d.file_name))]
    say_start(args, source, plan, len(plan) - len(missing))
    state.wait_for_everyone()

    # Draw:
    folder = Folder(args.output_dir, plan, args.write_metadata, state.is_main_process)
    if own := missing[state.process_index :: state.num_processes]:
        painter = Painter(args, source, state.device, own)
        with folder, progress(total=len(own), desc="drawing", unit="picture", disable=not folder.is_main) as bar:
            for batch, images, withheld in painter.draw(own):
                folder.add(batch, images, withheld)
                bar.update(len(batch))
                stop.saved = f"after {bar.n} of {len(own)} pictures; --resume draws the rest into {args.output_dir}"

    # What all of them have drawn:
    withheld = gather_object(folder.withheld) if state.num_processes > 1 else folder.withheld
    if folder.is_main:
        finish(args, source, folder, withheld)


def plan_drawings(args: argparse.Namespace, source: Source, shape: ModelShape) -> list[Drawing]:
    """Every prompt with every seed, each picture once."""
    model_hash, name = source.fingerprint(), recorded_name(args, source)
    chunks, wishes = source.run.get("max_token_chunks", MAX_TOKEN_CHUNKS), wishes_of(args)
    sizes = {(w.height, w.width): picture_size(w.height, w.width, source.run, shape) for w in wishes}
    drawings = []
    for wish in wishes:
        height, width = sizes[wish.height, wish.width]
        settings = {
            "steps": wish.steps,
            "scheduler": args.scheduler,
            "guidance": wish.guidance_scale,
            "guidance_rescale": args.guidance_rescale,
            "negative_prompt": wish.negative_prompt,
            "height": height,
            "width": width,
            "token_chunks": chunks,
            "dtype": args.dtype or ("fp32" if choose_device().type == "cpu" else "fp16"),
            "safety_checker": args.safety_checker and has_checker(source.base),
            "model": name,
        }
        seeds = range(wish.seed, wish.seed + wish.num_images)
        drawings += [Drawing(wish.prompt, seed, settings, model_hash, args.format) for seed in seeds]
    return list({drawing.file_name: drawing for drawing in drawings}.values())


def wishes_of(args: argparse.Namespace) -> list[Wish]:
    """The prompts with all that their rows leave open filled in from the flags."""
    names = ("negative_prompt", "seed", "steps", "guidance_scale", "num_images", "height", "width")
    flags = {name: getattr(args, name) for name in names}
    return [
        Wish(w.prompt, **{name: value if (own := getattr(w, name)) is None else own for name, value in flags.items()})
        for w in args.wishes
    ]


def recorded_name(args: argparse.Namespace, source: Source) -> str:
    """How a model is recorded: a folder of this repository without the place where the repository happens to be."""
    path, root = Path(args.model).expanduser().resolve(), Path(__file__).resolve().parents[1]
    name = path.relative_to(root).as_posix() if path.is_dir() and path.is_relative_to(root) else args.model
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


def say_start(args: argparse.Namespace, source: Source, plan: Sequence[Drawing], there: int) -> None:
    already = f", {there} of them there already" if there else ""
    print(f"{len(plan)} pictures{already}, drawn by {source.told()} (another: --model {REAL_MODEL})", flush=True)
    if line := missing_trigger(source, [wish.prompt for wish in args.wishes]):
        print(harmless(line), flush=True)


class Painter:
    """The loaded model, and everything that is the same for all pictures."""

    def __init__(self, args: argparse.Namespace, source: Source, device: torch.device, drawings: Sequence[Drawing]):
        self.args, self.device = args, device
        self.batch_size = AUTO_BATCH[device.type] if args.batch_size == "auto" else args.batch_size
        settings, self.shape = drawings[0].settings, read_shape(source.base)
        dtype = DTYPES[settings["dtype"]]
        texts = dict.fromkeys(text for d in drawings for text in (d.settings["negative_prompt"], d.prompt))
        self.text = encode_prompts(source, list(texts), settings["token_chunks"], device, dtype)
        self.unet, self.sampler = load_source_unet(source, dtype).to(device), sampler_of(source, args.scheduler)
        height, width = max(((d.settings["height"], d.settings["width"]) for d in drawings), key=math.prod)
        choose_attention(self.unet, self.shape, height, width, device.type)
        self.predict = torch.compile(self.unet) if args.compile else self.unet
        self.vae = load_vae(source.base).to(device)  # fp32 also on a GPU: half precision shows and saves little
        self.checker = SafetyChecker(source.base, device) if settings["safety_checker"] else NoChecker()

    def draw(
        self, drawings: Sequence[Drawing]
    ) -> Iterator[tuple[Sequence[Drawing], Sequence[Image.Image], list[bool]]]:
        """Batch by batch: the drawings, their pictures, and which of those the safety checker has blackened.

        A batch that does not fit into the memory is halved, and so are all that follow it.
        """
        for _, group in groupby(drawings, key=lambda d: {**d.settings, "negative_prompt": None}):
            waiting = list(group)
            while waiting:
                batch = waiting[: self.batch_size]
                try:
                    images = self.paint(batch)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self.take_less(batch)
                    continue
                yield batch, *self.checker.check(images)
                waiting = waiting[len(batch) :]

    def paint(self, batch: Sequence[Drawing]) -> list[Image.Image]:
        settings = batch[0].settings
        latent_shape = self.shape.latent_shape(settings["height"], settings["width"])
        generators = [seeded(drawing.seed) for drawing in batch]
        latents = draw_latents(
            self.predict, self.sampler,
            torch.stack([initial_noise(generator, latent_shape) for generator in generators]),
            [self.text[drawing.prompt] for drawing in batch],
            [self.text[drawing.settings["negative_prompt"]] for drawing in batch],
            settings["guidance"], settings["steps"], settings["guidance_rescale"], generators,
        )  # fmt: skip
        return decode_latents(self.vae, latents)

    def take_less(self, batch: Sequence[Drawing]) -> None:
        """Half of the batch size that was too much; WorkError where that was one picture."""
        if len(batch) == 1:
            width, height = batch[0].settings["width"], batch[0].settings["height"]
            raise WorkError(f"not enough memory for one picture of {width} x {height} px; a smaller --width, --height")
        self.batch_size = len(batch) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"not enough memory for {len(batch)} pictures at once: going on with {self.batch_size}", flush=True)


def encode_prompts(
    source: Source, prompts: Sequence[str], chunks: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The embedding of each prompt, as training read its captions; the text encoder is gone when this returns."""
    tokenizer, text_encoder = load_tokenizer(source.base), load_source_text_encoder(source, dtype).to(device)
    room = chunks * (tokenizer.model_max_length - 2)
    for prompt in prompts:
        if (tokens := count_tokens(tokenizer, prompt)) > room:
            print(harmless(f"only the first {room} of {tokens} tokens are read of: {prompt}"))
    return {prompt: encode_prompt(tokenizer, text_encoder, prompt, chunks) for prompt in prompts}


@dataclass
class Folder:
    """The pictures' folder: files are written by a thread of their own while the next batch is drawn.

    images.jsonl lists those of the plan that are there, whoever drew them, so the main process alone writes it. Left
    early, for whatever reason, the folder has all that was drawn.
    """

    path: Path
    plan: Sequence[Drawing]
    metadata: bool
    is_main: bool
    withheld: list[str] = field(default_factory=list)
    pending: list[Future] = field(default_factory=list)

    def __enter__(self) -> "Folder":
        self.thread = ThreadPoolExecutor(1)
        return self

    def add(self, batch: Sequence[Drawing], images: Sequence[Image.Image], withheld: Sequence[bool]) -> None:
        self._settle()
        self.withheld += [drawing.file_name for drawing, bad in zip(batch, withheld, strict=True) if bad]
        self.pending = [
            self.thread.submit(save_drawing, image, self.path, drawing)
            for drawing, image in zip(batch, images, strict=True)
        ]

    def _settle(self) -> None:
        """Waits for the batch before: no more than two are in memory, and a full disk is told before the next."""
        for saved in self.pending:
            saved.result()
        if self.pending and self.is_main:
            self.list_pictures()
        self.pending = []

    def list_pictures(self) -> list[Drawing]:
        """Brings images.jsonl, and metadata.jsonl where it is asked for, up to date; the pictures that are there."""
        there = [drawing for drawing in self.plan if (self.path / drawing.file_name).is_file()]
        withheld = write_rows(self.path, there, self.withheld)
        if self.metadata:
            write_metadata(self.path, [drawing for drawing in there if drawing.file_name not in withheld])
        return there

    def __exit__(self, kind, *rest: object) -> None:
        try:
            self._settle()
        finally:
            self.thread.shutdown()


def finish(args: argparse.Namespace, source: Source, folder: Folder, withheld: Sequence[str]) -> None:
    """The lists and the contact sheet of all that was asked for, and the last lines."""
    folder.withheld = list(withheld)
    drawn = folder.list_pictures()
    captions = [(drawing.prompt, drawing.seed) for drawing in drawn]
    sheet = make_contact_sheet([args.output_dir / d.file_name for d in drawn], captions, recorded_name(args, source))
    path = save_image(sheet, args.output_dir / SHEET_FILE)
    if withheld:
        print(f"{len(withheld)} withheld by the model's safety checker, black here (--no_safety_checker):")
        print("  " + "\n  ".join(withheld))
    print(f"{len(drawn)} pictures in {shown(args.output_dir)}, all of them in {shown(path)}")
