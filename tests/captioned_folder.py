"""A captioned folder of three small pictures to train on."""

import json
from argparse import Namespace
from pathlib import Path

CAPTIONS = {
    "11 (1).JPG": "A single pair of denim jeans laid flat on a white background, seen from the front. It is faded.",
    "11 (2).JPG": "A red t-shirt laid flat on a white background.",
    "11 (3).JPG": "A single pair of denim jeans laid flat on a white background, seen from the back. "
    + "The legs. " * 30,
}

# What `data.captioned_folders.read_dataset` asks of the flags, at their defaults but for the shorter captions.
READING = Namespace(
    validation_dir=None, metadata_file=None, short_captions=True, caption_column="text", image_column="image",
    mask_from_alpha=False, trigger=None,
)  # fmt: skip


def write_captioned_folder(folder: Path, captions: dict[str, str] = CAPTIONS) -> Path:
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True)
    for name, caption in captions.items():
        image = Image.new("RGB", (48, 64), "white")
        ImageDraw.Draw(image).rectangle((12, 6, 36, 58), fill="red" if "red" in caption else "navy")
        image.save(folder / name, format="JPEG")
    rows = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder
