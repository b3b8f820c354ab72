"""diffusers' train_text_to_image.py beside ours: both as commands, the same model, pictures and settings."""

import json
from pathlib import Path

from gpu.machine import bf16_works
from gpu.random_models import model_folder, picture_folder
from gpu.rows import Measurement, Report, Skipped
from gpu.scripts import SCRIPTS, run_script
from gpu.settings import Settings

THEIRS, OURS = "diffusers' script, batch 16, bf16, EMA", "ours, batch 16, bf16, EMA"
# Images a second between these steps, so that the start drops out. The run would be longer: ours measures a loss on
# fixed noise after its last step.
FIRST, LAST = 10, 40
WORKERS = 8  # that read pictures: in the main process theirs would wait for each


def measurements(group: str, settings: Settings) -> list[Measurement]:
    both = SideBySide(settings)
    return [Measurement(THEIRS, both.theirs, 60), Measurement(OURS, both.ours, 60)]


class SideBySide:
    """Each script at its own defaults, but for what both are told."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.batch = settings.batch(16)
        self.first, self.last = (1, 3) if settings.tiny else (FIRST, LAST)

    def theirs(self) -> dict:
        script = self.settings.diffusers_script
        if script is None:
            raise Skipped("needs --diffusers_script")
        return self.rate(script, "--cache_dir", self.settings.work / "hub")

    def ours(self) -> dict:
        if self.settings.diffusers_script is None:
            raise Skipped("needs --diffusers_script")
        # Not interrupted by losses on fixed noise, which theirs does not measure.
        own = ["--prior_images", 0, "--validation_steps", 10**6]
        rate = self.rate(SCRIPTS / "train_text_to_image.py", *own)
        theirs = Report(self.settings.out).find("diffusers", THEIRS)
        faster = rate["images/s"] / theirs.measured["images/s"] if theirs and theirs.measured else None
        return {**rate, **({"times as fast": round(faster, 2)} if faster else {})}

    def rate(self, script: Path, *further: object) -> dict:
        """Images a second, by the clock, between two steps."""
        pictures = picture_folder(self.settings, count=self.batch * self.last)  # one epoch
        times_file, output = self.settings.work / "times.json", self.settings.work / f"by {script.parent.name}"
        flags = [
            "--pretrained_model_name_or_path", model_folder(self.settings), "--train_data_dir", pictures,
            "--output_dir", output, "--resolution", self.settings.resolution, "--center_crop", "--seed", 0,
            "--train_batch_size", self.batch, "--max_train_steps", self.last + 10, "--use_ema",
            "--lr_scheduler", "constant", "--lr_warmup_steps", 0, "--learning_rate", "1e-5",
            "--checkpointing_steps", 10**6,
            "--dataloader_num_workers", 0 if self.settings.tiny else WORKERS,
            "--mixed_precision", "bf16" if bf16_works() else "fp16",
        ]  # fmt: skip
        run_script(self.settings, Path(__file__).with_name("timed_script.py"), times_file, self.last, script,
                   *flags, *further)  # fmt: skip
        times = json.loads(times_file.read_text())
        seconds = (times[str(self.last)] - times[str(self.first)]) / (self.last - self.first)
        return {"batch": self.batch, "images/s": round(self.batch / seconds, 1), "ms a step": round(1000 * seconds, 1)}
