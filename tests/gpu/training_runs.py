"""Training in this process through the real parts: prepare_run, encode_dataset, TrainState and train_step."""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.state import AcceleratorState

from gpu.machine import bf16_works
from gpu.random_models import model_folder, picture_folder
from gpu.rows import Skipped
from gpu.settings import Settings, need_compiler
from runtime.devices import peak_memory_gb, synchronize
from runtime.errors import is_out_of_memory
from train_text_to_image import parse_args
from training.encoding import encode_dataset
from training.memory_rows import plan_memory
from training.samples import StepBatches
from training.setup import PreparedRun, make_batches, prepare_run
from training.state import TrainState
from training.train import train_step

Result = TypeVar("Result")


@dataclass
class Started:
    """A run that is ready for its first step."""

    run: PreparedRun
    state: TrainState
    batches: StepBatches
    step: int = 0

    def take_step(self) -> torch.Tensor:
        """The loss of the next step, still on its way from the GPU."""
        result = train_step(self.run, self.state, self.batches, self.step)
        self.step += 1
        return result.loss

    def seconds_per_step(self, warm_up: int, steps: int) -> float:
        """Of `steps` steps after those that warm up. AssertionError where the last loss is not finite."""
        for _ in range(warm_up):
            self.take_step()
        synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            loss = self.take_step()
        synchronize()
        seconds = (time.perf_counter() - begun) / steps
        assert math.isfinite(loss.item()), f"the loss is {loss.item()}"
        return seconds


@dataclass
class Trainer:
    """Starts runs on one model and one data set, which is encoded once for all of them."""

    settings: Settings
    model: Path
    pictures: Path
    encodings: object = None

    @classmethod
    def usual(cls, settings: Settings) -> "Trainer":
        return cls(settings, model_folder(settings), picture_folder(settings))

    def arguments(self, *flags: object) -> argparse.Namespace:
        """The real parser's; nothing of them is written but the cache."""
        usual = [
            "--pretrained_model_name_or_path", self.model, "--dataset", self.pictures,
            "--output_dir", self.settings.work / "never written", "--latents_cache_dir", self.settings.work / "cache",
            "--resolution", self.settings.resolution, "--max_train_steps", 1000, "--lr_warmup_steps", 0, "--seed", 0,
            "--prior_images", 0,
        ]  # fmt: skip
        return parse_args([str(word) for word in [*usual, *flags]])

    def start(self, *flags: object) -> Started:
        """The peak of memory is counted from here on, the encoding left out."""
        for flag in flags:
            need_support_for(flag)
        forget_earlier_run()
        run = prepare_run(self.arguments(*flags))
        self.encodings = self.encodings or encode_dataset(run)
        free_memory()
        return Started(run, TrainState.create(run), make_batches(run, self.encodings))


def need_support_for(flag: object) -> None:
    """Skips what does not work on this machine."""
    if flag == "--compile":
        need_compiler()
    if flag in ("bf16", "pure_bf16") and not bf16_works():
        raise Skipped("this card does not compute in bf16")


def forget_earlier_run() -> None:
    """accelerate keeps one precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def free_memory() -> None:
    """What earlier rows held is free again, and the peak is counted anew."""
    if "torch._dynamo" in sys.modules:  # keeps what it has compiled
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def with_largest_batch(batch: int, work: Callable[[int], Result]) -> Result:
    """`work(batch)`, with half of it, and so on, where the GPU's memory does not suffice."""
    while batch:
        try:
            return work(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0]
        print(f"batch {batch}: {said}", flush=True)
        free_memory()
        batch //= 2
    raise Skipped(f"one picture does not fit: {said}")


def memory_columns(run: PreparedRun) -> dict:
    """What was allocated at most since the run was started, and what is foretold for it."""
    foretold = plan_memory(run).forecast.total / 1e9
    return {"peak GB": round(peak_memory_gb(), 1), "foretold GB": round(foretold, 1)}
