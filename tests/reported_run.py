"""An output folder as training leaves it, made without training, and the facts of its plan."""

import json
import math
from pathlib import Path

from PIL import Image

from reporting.run_facts import DataPicture, RunFacts, split_pictures
from runs.validation_pictures import picture_info, picture_path

HOSTILE = (
    "\"><script>alert('caption')</script><img src=x onerror=alert(1)> ' \" & {{ 7 * 7 }} {% raw %} "
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0000 </style></svg> " + "word " * 1000
)


def write_rows(folder: Path, steps: range, measured_every: int = 10, held_out: bool = True) -> None:
    """Adds rows to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in steps:
            loss = 0.05 + 0.1 * math.exp(-step / 40) + 0.02 * math.sin(step * 1.7)
            row = {"step": step, "epoch": step / 10, "train_loss": loss, "lr": 2e-4 * (1 - step / 1000),
                   "images_per_second": 3.1 + 0.2 * math.sin(step), "peak_memory_gb": 1.5}  # fmt: skip
            if step % measured_every == 0:
                fixed = 0.04 + 0.05 * math.exp(-step / 50)
                row |= {"train_fixed_loss": fixed, "train_fixed_loss_ema": fixed + 0.002}
                row |= {"val_loss": fixed + 0.01, "val_loss_ema": fixed + 0.008 + step * 3e-5} if held_out else {}
            file.write(json.dumps(row) + "\n")


def write_record(folder: Path, **changes) -> None:
    start = {"at": "2026-01-02T03:04:05+00:00", "after_step": 0, "device": "cpu", "processes": 1}
    record = {
        "finished": False, "base_model": "starter/base", "steps": 200, "trained": "UNet", "device": "cpu", "seed": 7,
        "fingerprint": "0123456789abcdef" * 4, "arguments": {"dataset": "dataset"}, "starts": [start],
        "versions": {"python": "3.11.7", "torch": "2.14.1"}, "example_prompts": ["denim jeans"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**record, **changes}))


def write_validation(folder: Path, steps: list[int], prompts: list[str]) -> None:
    (folder / "validation").mkdir(exist_ok=True)
    for step in steps:
        for index, prompt in enumerate(prompts):
            image = Image.new("RGB", (64, 80), (step % 256, 90, 60 * index % 256))
            image.save(picture_path(folder, step, index), pnginfo=picture_info(prompt, 0))


def data_pictures(folder: Path, count: int, caption: str = "A pair of denim jeans.") -> list[DataPicture]:
    """The same small file under many names."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (60, 80), "navy").save(folder / "jeans.jpg")
    return [
        DataPicture(f"{index} jeans.jpg", folder / "jeans.jpg", (72, 56), (caption, "denim jeans"))
        for index in range(count)
    ]


def facts_of(pictures: list[DataPicture], held_out: list[DataPicture] = (), **changes) -> RunFacts:
    shown, others = split_pictures(pictures, held_out)
    facts = {
        "command": "python train_text_to_image.py --dataset dataset", "uses": [("generate with it", "python x.py")],
        "warnings": ["SMALLER than they are trained at: 1.jpg"], "settings": [("--epochs", "40", "flag")],
        "summary": [("steps", "200")], "pictures": shown, "others": others,
        "counts": (len(pictures), len(held_out)), "buckets": [("56 × 72", len(pictures), "at most 2.0% cropped")],
        "caption_tokens": [20 + index % 200 for index in range(len(pictures))],
        "token_marks": {75: "one chunk: 77", 225: "read: 225"}, "samples_per_step": 4,
    }  # fmt: skip
    return RunFacts(**{**facts, **changes})
