"""The real scripts as processes of their own, from the command line to the pictures."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu.machine import bf16_works
from gpu.random_models import model_folder
from gpu.rows import Measurement
from gpu.settings import ROOT, Settings
from runtime.devices import best_mixed_precision

SCRIPTS = ROOT / "text_to_image"
PROMPTS = ("denim jeans", "a red t-shirt")


def measurements(group: str, settings: Settings) -> list[Measurement]:
    scripts = Scripts(settings)
    if group == "starter":
        return [Measurement("the starter's whole job: train, then generate", scripts.whole_job, 100)]
    return [
        Measurement("train_text_to_image.py, 20 steps", scripts.train, 20),
        Measurement("inference.py, 2 prompts", scripts.generate, 15),
    ]


class Scripts:
    """A few steps and a few pictures, on the starter model; on a tiny one where all is tiny."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.output, self.pictures = settings.work / "first", settings.work / "first pictures"

    def train(self) -> dict:
        flags: list[object] = ["--dataset", ROOT / "dataset", "--output_dir", self.output, "--use_ema"]
        flags += ["--mixed_precision", "bf16" if bf16_works() else "fp16"]
        flags += ["--max_train_steps", 2 if self.settings.tiny else 20]
        if self.settings.tiny:
            flags += ["--pretrained_model_name_or_path", model_folder(self.settings)]
        run_script(self.settings, "train_text_to_image.py", *flags)
        return training_columns(self.output)

    def generate(self) -> dict:
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        flags = ["--model", self.output, "--output_dir", self.pictures, "--num_images", 2, "--seed", 1]
        flags += ["--steps", 2] if self.settings.tiny else []
        run_script(self.settings, "inference.py", *prompts, *flags)
        return {"pictures": count_pictures(self.pictures)}

    def whole_job(self) -> dict:
        """With the flags of job.sh; the contact sheet stays as OUT/starter_sheet.jpg."""
        output, pictures = self.settings.work / "starter", self.settings.work / "starter pictures"
        flags: list[object] = ["--dataset", ROOT / "dataset", "--output_dir", output]
        flags += ["--mixed_precision", precision] if (precision := best_mixed_precision()) else []
        if self.settings.tiny:
            flags += ["--pretrained_model_name_or_path", model_folder(self.settings), "--max_train_steps", 2]
        seconds = [time.perf_counter()]
        run_script(self.settings, "train_text_to_image.py", *flags)
        seconds.append(time.perf_counter())
        few = ["--steps", 2] if self.settings.tiny else []
        run_script(self.settings, "inference.py", "--model", output, "--num_images", 3, "--output_dir", pictures, *few)
        seconds.append(time.perf_counter())
        shutil.copyfile(pictures / "contact_sheet.jpg", self.settings.out / "starter_sheet.jpg")
        took = {"training, s": round(seconds[1] - seconds[0], 1), "generating, s": round(seconds[2] - seconds[1], 1)}
        return {**took, **training_columns(output), "pictures": count_pictures(pictures)}


def run_script(settings: Settings, name: str | Path, *flags: object) -> None:
    """AssertionError with the end of what it printed where it fails or takes longer than there is time."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, flags)]
    print("$", *command, flush=True)
    said = settings.work / "script.log"
    try:
        with open(said, "w") as log:  # no pipe: processes that the script leaves behind would keep it open
            patience = max(settings.seconds_left, 1)
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=patience)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{name} was not ready at the end of the time budget") from None
    finally:
        print(said.read_text(errors="replace"), flush=True)
    assert done.returncode == 0, f"{name} ended with exit code {done.returncode}:\n{said.read_text()[-2000:]}"


def training_columns(output: Path) -> dict:
    """What a finished run says of itself; AssertionError where a loss is not finite."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows]
    assert all(loss is not None and math.isfinite(loss) for loss in losses), f"losses: {losses}"
    return {
        "steps": len(rows),
        "first loss": round(losses[0], 4),
        "last loss": round(losses[-1], 4),
        "images/s": rows[-1]["images_per_second"],
        "peak GB": rows[-1]["peak_memory_gb"],
    }


def count_pictures(folder: Path) -> int:
    """How many were generated; AssertionError where one has a single colour, as overflows do."""
    from PIL import Image

    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    for row in rows:
        with Image.open(folder / row["file_name"]) as picture:
            low, high = picture.convert("L").getextrema()
        assert high > low, f"{row['file_name']} is of one colour"
    return len(rows)
