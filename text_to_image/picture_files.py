"""The files of a generation: pictures that tell how they were drawn, images.jsonl, and metadata.jsonl."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from captions import append_captions, existing_captions
from errors import UserError, WorkError, first_line
from files import remove_dead_litter, replace_text, replacing
from samplers import SAMPLERS

IMAGES_FILE, SHEET_FILE = "images.jsonl", "contact_sheet.jpg"
OWN_KEY, WEBUI_KEY = "text_to_image", "parameters"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Drawing:
    """A picture to draw; `settings` are the fields of its row in images.jsonl that come after the seed."""

    prompt: str
    seed: int
    settings: dict
    model_hash: str = ""
    suffix: str = "png"

    @property
    def file_name(self) -> str:
        """The same picture has the same name, another never has it."""
        words = "-".join(re.findall(r"\w+", self.prompt.lower())[:6])[:48] or "picture"
        identity = json.dumps([self.prompt, self.model_hash, {**self.settings, "model": None}])
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-{self.seed:06d}.{self.suffix}"

    @property
    def row(self) -> dict:
        """All that is needed to draw it again."""
        facts = {"file_name": self.file_name, "prompt": self.prompt, "seed": self.seed, **self.settings}
        return {**facts, "model_hash": self.model_hash}


def webui_parameters(drawing: Drawing) -> str:
    """What AUTOMATIC1111's 'PNG Info', ComfyUI and Civitai read of a picture."""
    settings = drawing.settings
    facts = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[settings["scheduler"]].title,
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": drawing.seed,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["model"]).name,
    }
    lines = [drawing.prompt]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in facts.items())])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def save_drawing(image: Image.Image, folder: Path, drawing: Drawing) -> Path:
    """The picture with `webui_parameters` and its row in it: as PNG text, or in the EXIF comment of a JPEG."""
    told = {WEBUI_KEY: webui_parameters(drawing), OWN_KEY: json.dumps(drawing.row, ensure_ascii=False)}
    if drawing.suffix == "jpg":
        exif = Image.Exif()
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + told[WEBUI_KEY].encode("utf-16-be")
        return save_image(image, folder / drawing.file_name, exif=exif, comment=told[OWN_KEY].encode())
    text = PngInfo()
    for key, value in told.items():
        text.add_text(key, value) if value.isascii() else text.add_itxt(key, value)
    return save_image(image, folder / drawing.file_name, pnginfo=text)


def save_image(image: Image.Image, path: Path, **settings) -> Path:
    """Written beside and renamed: whoever watches the folder never opens half a picture."""
    kind = {"format": "JPEG", "quality": JPEG_QUALITY} if path.suffix == ".jpg" else {"format": "PNG"}
    try:
        with replacing(path) as beside:
            image.save(beside, **kind, **settings)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def is_whole(path: Path) -> bool:
    """Whether it is a picture that opens to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, EOFError, ValueError):
        return False
    return True


def prepare_folder(folder: Path) -> None:
    """Makes it, and clears it of what a process that was killed left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None
    remove_dead_litter(folder)
    read_rows(folder / IMAGES_FILE)  # to be refused now, not after the first pictures


def write_rows(folder: Path, drawn: Iterable[Drawing], withheld: Collection[str] = ()) -> set[str]:
    """One row of images.jsonl for each picture of the folder; a picture that is drawn again keeps one row.

    Returns the names of those whose rows say that they are withheld, now or by an earlier start.
    """
    rows = read_rows(folder / IMAGES_FILE)
    for drawing in drawn:
        before = rows.pop(drawing.file_name, {})  # and at the end again: in the order of the plan
        flagged = drawing.file_name in withheld or before.get("withheld")
        rows[drawing.file_name] = {**drawing.row, "withheld": True} if flagged else drawing.row
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
    replace_text(folder / IMAGES_FILE, text)
    return {name for name, row in rows.items() if row.get("withheld")}


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of images.jsonl by the name of their picture."""
    try:
        # Only \n ends a row: str.splitlines() would also cut a prompt at U+2028.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return {row["file_name"]: row for row in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); move it away") from None


def write_metadata(folder: Path, drawn: Iterable[Drawing]) -> None:
    """Adds the pictures to metadata.jsonl, their prompts as captions, so that the folder is a data set. Pictures of an
    empty prompt stay out: there is no caption for them."""
    there = {row.file_name for row in existing_captions(folder)}
    new = [drawing for drawing in drawn if drawing.prompt.strip() and drawing.file_name not in there]
    append_captions(folder, [(drawing.file_name, drawing.prompt) for drawing in new])
