"""The files of a generation: pictures with their settings inside, images.jsonl and metadata.jsonl."""

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.decoding import open_picture
from data.images import save_image
from generation.gallery import try_write_gallery
from generation.image_rows import IMAGES_FILE, read_image_rows
from generation.planned_images import GeneratedBatch, PlannedImage
from metadata.image_files import METADATA
from metadata.reading import scan_rows
from metadata.writer import append_captions
from models.samplers import SAMPLERS
from runtime.errors import UserError
from runtime.files import remove_stale_partial_files, write_text_atomically

OWN_KEY, WEBUI_KEY = "text_to_image", "parameters"  # of the text in a picture
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
PAGE_INTERVAL, PAGE_COST = 60, 100  # seconds between updates of the page, and times its own cost at least
LIST_INTERVAL = 10  # seconds between updates of the lists; after a kill, --resume lists what is missing


def webui_parameters(planned: PlannedImage) -> str:
    """The text that AUTOMATIC1111's 'PNG Info', ComfyUI and Civitai read from a picture."""
    settings = planned.settings
    facts = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.scheduler].title,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": planned.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": planned.model_title,
    }
    lines = [planned.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def save_generated_image(image: Image.Image, folder: Path, planned: PlannedImage, withheld: bool = False) -> Path:
    """The picture with `webui_parameters` and its row of images.jsonl in it: as PNG text, or in a JPEG's EXIF and
    comment."""
    name = planned.withheld_name if withheld else planned.file_name
    parameters, row = webui_parameters(planned), json.dumps(planned.to_row(name), ensure_ascii=False)
    if planned.extension == "jpg":
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
        return save_image(image, folder / name, exif=exif, comment=row.encode())
    info = PngInfo()
    for key, value in ((WEBUI_KEY, parameters), (OWN_KEY, row)):
        info.add_text(key, value) if value.isascii() else info.add_itxt(key, value)
    return save_image(image, folder / name, pnginfo=info)


def find_file(folder: Path, planned: PlannedImage) -> str | None:
    """The name of the picture's file in `folder`, withheld or not; None if there is none."""
    names = (planned.file_name, planned.withheld_name)
    return next((name for name in names if (folder / name).is_file()), None)


def is_generated(folder: Path, planned: PlannedImage) -> bool:
    """Whether the picture's file is there and intact."""
    name = find_file(folder, planned)
    return name is not None and is_intact_image(folder / name)


def is_intact_image(path: Path) -> bool:
    """Whether the file opens as a picture and decodes to its end."""
    try:
        with open_picture(path) as image:
            image.load()
    except ValueError:
        return False
    return True


def prepare_folder(folder: Path) -> None:
    """Makes the folder, and removes the half-written files of processes that are gone.

    Raises UserError where the folder or its lists cannot be used: now, not after the first pictures.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: no permission to write; see `ls -ld` of it")
    remove_stale_partial_files(folder)
    read_image_rows(folder / IMAGES_FILE)
    scan_rows(folder / METADATA, folder)


def write_image_rows(folder: Path, files: Mapping[PlannedImage, str]) -> None:
    """A row of images.jsonl for each of `files` (image: its file's name), after the rows of other runs."""
    rows = read_image_rows(folder / IMAGES_FILE)
    for planned, name in files.items():
        rows.pop(name, None)
        rows[name] = planned.to_row(name)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    write_text_atomically(folder / IMAGES_FILE, text)


def append_metadata(folder: Path, files: Mapping[PlannedImage, str]) -> None:
    """Adds the pictures to metadata.jsonl with their prompts as captions, so that the folder is a data set.

    Withheld pictures stay out, and those with an empty prompt, which is no caption.
    """
    listed = {row.file_name for row in scan_rows(folder / METADATA, folder)}
    usable = [planned for planned, name in files.items() if name == planned.file_name and planned.prompt.strip()]
    append_captions(folder, [(i.file_name, i.prompt) for i in usable if i.file_name not in listed])


@dataclass
class OutputWriter:
    """Saves pictures in a thread of its own while the next batch is generated, and keeps the lists up to date.

    Leaving the block, even by an exception, saves and lists all that was added. Only the main process writes the
    lists: they have every picture of the plan that is there, whichever process generated it.
    """

    folder: Path
    plan: Sequence[PlannedImage]
    with_metadata: bool
    is_main: bool
    _pending: list[Future] = field(default_factory=list)
    _last_update: float = -math.inf  # of the lists, time.monotonic()
    _next_page: float = field(default_factory=lambda: time.monotonic() + PAGE_INTERVAL)

    def __enter__(self) -> "OutputWriter":
        self._thread = ThreadPoolExecutor(1)
        return self

    def add(self, batch: GeneratedBatch) -> None:
        self._wait_for_saves()
        self._pending = [
            self._thread.submit(save_generated_image, image, self.folder, planned, withheld)
            for planned, image, withheld in zip(batch.planned, batch.images, batch.withheld, strict=True)
        ]
        if self.is_main and time.monotonic() - self._last_update > LIST_INTERVAL:
            self.update_lists()
        if self.is_main and time.monotonic() > self._next_page:
            self._refresh_page()

    def _refresh_page(self) -> None:
        """Writes index.html, and not again before a hundred times as long as that took."""
        started = time.monotonic()
        try_write_gallery(self.folder)
        now = time.monotonic()
        self._next_page = now + max(PAGE_INTERVAL, PAGE_COST * (now - started))

    def _wait_for_saves(self) -> None:
        """At most two batches are in memory, and a full disk is reported before the next batch."""
        for save in self._pending:
            save.result()
        self._pending = []

    def update_lists(self) -> dict[PlannedImage, str]:
        """Brings images.jsonl up to date, and metadata.jsonl if asked for; returns {image: its file's name}."""
        names = {planned: find_file(self.folder, planned) for planned in self.plan}
        files = {planned: name for planned, name in names.items() if name}
        write_image_rows(self.folder, files)
        if self.with_metadata:
            append_metadata(self.folder, files)
        self._last_update = time.monotonic()
        return files

    def finish(self) -> dict[PlannedImage, str]:
        """The lists and the page of all pictures that are there now; returns as `update_lists`."""
        files = self.update_lists()
        try_write_gallery(self.folder)
        return files

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        try:
            self._wait_for_saves()
        finally:
            self._thread.shutdown()
            if self.is_main:
                self.finish() if exception else self.update_lists()
