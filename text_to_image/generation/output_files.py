"""The files of a generation: pictures that tell how they were drawn, images.jsonl, and metadata.jsonl."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.image_files import METADATA, WITHHELD_SUFFIX
from data.images import save_image
from data.metadata import scan_rows
from data.metadata_writer import append_captions
from models.samplers import SAMPLERS
from runtime.errors import UserError, first_line
from runtime.files import remove_stale_partial_files, write_text_atomically

IMAGES_FILE, SHEET_FILE = "images.jsonl", "contact_sheet.jpg"
OWN_KEY, WEBUI_KEY = "text_to_image", "parameters"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LISTED_EVERY = 10  # seconds: what is drawn since is listed at the end, or by --resume after a kill


@dataclass(frozen=True, eq=False)
class PlannedImage:
    """A picture to draw; `settings` are the fields of its row in images.jsonl that come after the seed."""

    prompt: str
    seed: int
    settings: dict
    model_hash: str = ""
    title: str = ""  # the model's name in a word
    suffix: str = "png"

    @cached_property
    def file_name(self) -> str:
        """The same picture has the same name, another never has it."""
        words = "-".join(re.findall(r"\w+", self.prompt.lower())[:6])[:48] or "picture"
        identity = json.dumps([self.prompt, self.model_hash, {**self.settings, "model": None}])
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-{self.seed:06d}.{self.suffix}"

    @property
    def withheld_name(self) -> str:
        """What it is called where the safety checker has blackened it."""
        return self.file_name.replace(f".{self.suffix}", f"{WITHHELD_SUFFIX}.{self.suffix}")

    def row(self, name: str) -> dict:
        """All that is needed to draw it again, for the file `name`."""
        row = {"file_name": name, "prompt": self.prompt, "seed": self.seed, **self.settings}
        row["model_hash"] = self.model_hash
        return row if name == self.file_name else {**row, "withheld": True}


def webui_parameters(drawing: PlannedImage) -> str:
    """What AUTOMATIC1111's 'PNG Info', ComfyUI and Civitai read of a picture."""
    settings = drawing.settings
    facts = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[settings["scheduler"]].title,
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": drawing.seed,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": drawing.title,
    }
    lines = [drawing.prompt]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def save_drawing(image: Image.Image, folder: Path, drawing: PlannedImage, withheld: bool = False) -> Path:
    """The picture with `webui_parameters` and its row in it: as PNG text, or in the EXIF comment of a JPEG."""
    name = drawing.withheld_name if withheld else drawing.file_name
    told = {WEBUI_KEY: webui_parameters(drawing), OWN_KEY: json.dumps(drawing.row(name), ensure_ascii=False)}
    if drawing.suffix == "jpg":
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + told[WEBUI_KEY].encode("utf-16-be")
        return save_image(image, folder / name, exif=exif, comment=told[OWN_KEY].encode())
    text = PngInfo()
    for key, value in told.items():
        text.add_text(key, value) if value.isascii() else text.add_itxt(key, value)
    return save_image(image, folder / name, pnginfo=text)


def found(folder: Path, drawing: PlannedImage) -> str | None:
    """The name of its file in `folder`, as a picture or as one that was withheld; None where it is not drawn."""
    names = (drawing.file_name, drawing.withheld_name)
    return next((name for name in names if (folder / name).is_file()), None)


def is_intact_image(path: Path) -> bool:
    """Whether it is a picture that opens to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, EOFError, ValueError):
        return False
    return True


def prepare_folder(folder: Path) -> None:
    """Makes it, and clears it of what a process that was killed left half-written; UserError where it or its lists
    cannot be used, now and not after the first pictures."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: cannot be written into; see `ls -ld` of it")
    remove_stale_partial_files(folder)
    read_image_rows(folder / IMAGES_FILE)
    scan_rows(folder / METADATA, folder)


def write_rows(folder: Path, drawn: dict[PlannedImage, str]) -> None:
    """One row of images.jsonl for each picture, in the order of the plan after those of other runs."""
    rows = read_image_rows(folder / IMAGES_FILE)
    for drawing, name in drawn.items():
        rows.pop(name, None)
        rows[name] = drawing.row(name)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    write_text_atomically(folder / IMAGES_FILE, text)


def read_image_rows(path: Path) -> dict[str, dict]:
    """The rows of images.jsonl by the name of their picture."""
    try:
        # Only \n ends a row: str.splitlines() would also cut a prompt at U+2028.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return {row["file_name"]: row for row in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); move it away") from None


def write_metadata(folder: Path, drawn: dict[PlannedImage, str]) -> None:
    """Adds the pictures to metadata.jsonl, their prompts as captions, so that the folder is a data set. Those of an
    empty prompt stay out, as there is no caption for them, and those that were withheld."""
    there = {row.file_name for row in scan_rows(folder / METADATA, folder)}
    fit = {drawing.file_name: drawing.prompt for drawing, name in drawn.items() if name == drawing.file_name}
    append_captions(folder, [(name, text) for name, text in fit.items() if text.strip() and name not in there])


@dataclass
class OutputWriter:
    """Where a plan is drawn into: files are written by a thread of their own while the next batch is drawn.

    The lists tell of those of the plan that are there, whoever drew them, so the main process alone writes them. Left
    early, for whatever reason, the folder has all that was drawn.
    """

    path: Path
    plan: Sequence[PlannedImage]
    metadata: bool
    is_main: bool
    pending: list[Future] = field(default_factory=list)
    listed: float = -math.inf  # when, in seconds

    def __enter__(self) -> "OutputWriter":
        self.thread = ThreadPoolExecutor(1)
        return self

    def add(self, batch: Sequence[PlannedImage], images: Sequence[Image.Image], withheld: Sequence[bool]) -> None:
        self._settle()
        self.pending = [
            self.thread.submit(save_drawing, image, self.path, drawing, bad)
            for drawing, image, bad in zip(batch, images, withheld, strict=True)
        ]
        if self.is_main and time.monotonic() - self.listed > LISTED_EVERY:
            self.list_pictures()

    def _settle(self) -> None:
        """Waits for the batch before: no more than two are in memory, and a full disk is told before the next."""
        for saved in self.pending:
            saved.result()
        self.pending = []

    def list_pictures(self) -> dict[PlannedImage, str]:
        """Brings images.jsonl, and metadata.jsonl where it is asked for, up to date; those that are there, with the
        names of their files."""
        names = {drawing: found(self.path, drawing) for drawing in self.plan}
        there = {drawing: name for drawing, name in names.items() if name}
        write_rows(self.path, there)
        if self.metadata:
            write_metadata(self.path, there)
        self.listed = time.monotonic()
        return there

    def __exit__(self, *exception: object) -> None:
        try:
            self._settle()
        finally:
            self.thread.shutdown()
            if self.is_main:
                self.list_pictures()
