"""Whether a run on a GPU survives what it should: a stop, an overflow, a bad sample; and whether a step ever waits."""

import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from gpu.machine import bf16_works
from gpu.random_models import model_folder, picture_folder
from gpu.rows import Measurement
from gpu.settings import ROOT, Settings, need_gpu
from gpu.training_runs import Started, Trainer, forget_earlier_run, free_memory
from run_folder import losses, rows
from runtime.paths import STARTER
from training import train as training

RESUMED_LIMIT = 5e-3  # relative, of a loss: some GPU kernels add in no fixed order
SCALE_THAT_OVERFLOWS = 2.0**40
PLAIN_STEPS = 10
WITHOUT_WAITING = {
    "fp32": ("--mixed_precision", "no"),
    "bf16": ("--mixed_precision", "bf16"),
    "fp16 with its scaler": ("--mixed_precision", "fp16"),
    "pure bf16": ("--optimizer", "adamw", "--mixed_precision", "pure_bf16"),
    "pure bf16, Adafactor": ("--optimizer", "adafactor", "--mixed_precision", "pure_bf16"),
}


class Robustness:
    """Short runs of the starter model, or of a tiny one, in this process."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def measurements(self) -> list[Measurement]:
        waits = [
            Measurement(f"no waiting for the GPU in ten steps, {name}", lambda f=flags: self.count_waits(*f), 6)
            for name, flags in WITHOUT_WAITING.items()
        ]
        return [
            Measurement("a resumed run has the losses of an uninterrupted one", self.resume, 15),
            Measurement("a non-finite sample is skipped", self.skip_bad_sample, 6),
            Measurement("fp16: an overflow of the scaler is survived", self.overflow, 8),
            *waits,
        ]

    @cached_property
    def trainer(self) -> Trainer:
        model = model_folder(self.settings) if self.settings.tiny else Path(STARTER)
        return Trainer(self.settings, model, picture_folder(self.settings))

    def start(self, *flags: str) -> Started:
        size = 64 if self.settings.tiny else 128
        return self.trainer.start(*flags, "--train_batch_size", 4, "--resolution", size, "--use_ema")

    def train(self, name: str, steps: int, *flags: object) -> Path:
        """The whole of training, as the script runs it; returns the output folder."""
        forget_earlier_run()
        free_memory()
        output = self.settings.work / name
        usual = [
            "--output_dir", output, "--max_train_steps", steps, "--train_batch_size", 2, "--use_ema",
            "--resolution", 64 if self.settings.tiny else 128, "--lr_scheduler", "constant",
            "--mixed_precision", "bf16" if bf16_works() else "no",
        ]  # fmt: skip
        training.train(self.trainer.arguments(*usual, *flags))
        return output

    def resume(self) -> dict:
        half = 2 if self.settings.tiny else 4
        whole = losses(self.train("whole", 2 * half))
        self.train("stopped", half, "--checkpointing_steps", half)
        resumed = losses(self.train("stopped", 2 * half, "--checkpointing_steps", half))
        assert len(resumed) == len(whole), f"{len(resumed)} rows, not {len(whole)}"
        apart = max(abs(a / b - 1) for a, b in zip(resumed, whole, strict=True))
        assert apart <= RESUMED_LIMIT, f"{resumed} resumed, {whole} uninterrupted"
        return {"steps": len(whole), "largest difference of a loss": f"{apart:.1e}"}

    def skip_bad_sample(self) -> dict:
        with infinite_loss_at(step=2):
            output = self.train("bad sample", 3)
        skipped = [row["step"] for row in rows(output) if row.get("skipped")]
        assert skipped == [2], f"skipped: {skipped}"
        assert all(math.isfinite(loss) for loss in losses(output) if loss is not None)
        return {"skipped steps": skipped}

    def overflow(self) -> dict:
        need_gpu()
        started = self.start("--mixed_precision", "fp16")
        scaler = started.run.accelerator.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": SCALE_THAT_OVERFLOWS})
        results = [training.train_step(started.run, started.state, started.batches, step) for step in range(40)]
        overflowed = sum(not math.isfinite(result.grad_norm.item()) for result in results)
        assert 0 < overflowed < len(results) - 5, f"{overflowed} of {len(results)} steps overflowed"
        assert all(math.isfinite(result.loss.item()) for result in results), "a loss is not finite"
        assert all(p.isfinite().all() for p in started.state.unet.parameters()), "a weight is not finite"
        return {"steps that overflowed": overflowed, "scale at the end": scaler.get_scale()}

    def count_waits(self, *flags: str) -> dict:
        need_gpu()
        started = self.start(*flags)
        for _ in range(3):
            started.take_step()
        with synchronizing_lines() as lines:
            for _ in range(PLAIN_STEPS):
                started.take_step()
        torch.cuda.synchronize()
        found = {line: lines.count(line) for line in dict.fromkeys(lines)}
        assert not found, f"these lines waited for the GPU in {PLAIN_STEPS} steps (times): {found}"
        return {"waits in ten steps": 0}


@contextmanager
def infinite_loss_at(step: int) -> Iterator[None]:
    """The loss of this step (from 1) is infinite, as a spoilt latent would make it; one batch is one step."""
    real, taken = training.diffusion_loss, [0]

    def spoiled(unet, objective, batch):
        taken[0] += 1
        found = real(unet, objective, batch)
        return found * float("inf") if taken[0] == step else found

    training.diffusion_loss = spoiled
    try:
        yield
    finally:
        training.diffusion_loss = real


@contextmanager
def synchronizing_lines() -> Iterator[list[str]]:
    """The lines of this repository, and below them of the libraries, that make PyTorch wait for the GPU.

    In the mode 'error' the first of them would hide the others.
    """
    lines: list[str] = []

    def note(*warning: object, **further: object) -> None:
        if "synchronizing CUDA operation" in str(warning[0]):
            lines.append(innermost_line())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


def innermost_line() -> str:
    """'training/state.py:88 step, in torch/optim/adam.py:12 step' of the present stack."""
    frames = [f for f in traceback.extract_stack() if f.filename not in (__file__, warnings.__file__)]
    own = [frame for frame in frames if frame.filename.startswith(str(ROOT / "text_to_image"))]
    places = [frames[-1], *own[-1:]] if frames else []
    return " from ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in places)
