"""Images a second in training at Stable Diffusion 1.5's size, through the real train_step, and what limits them."""

import subprocess
import time
from functools import cached_property

import torch

from gpu.machine import PEAK, PEAK_COLUMN
from gpu.random_models import TFLOP_PER_SAMPLE
from gpu.rows import Measurement, Report
from gpu.settings import Settings, need_gpu
from gpu.training_runs import Started, Trainer, memory_columns, with_largest_batch
from runtime.devices import synchronize

BF16 = ("--mixed_precision", "bf16")
EMA = "--use_ema"
LORA_SHARE = 2 / 3  # of TFLOP_PER_SAMPLE: frozen weights need no gradient of their own
BUSY_STEPS = 20


def measurements(group: str, settings: Settings) -> list[Measurement]:
    rows = Speed(settings)
    fp16 = ("--mixed_precision", "fp16")
    return [
        rows.training("batch 16, bf16, EMA", 16, *BF16, EMA, seconds=30),  # it makes the model
        rows.training("batch 64, bf16, EMA", 64, *BF16, EMA),
        rows.training("batch 4, bf16, EMA", 4, *BF16, EMA),
        rows.training("batch 1, bf16, EMA", 1, *BF16, EMA),
        Measurement("what limits it: batch 16, bf16, EMA", rows.limits, 12),
        rows.training("batch 16, bf16, EMA, checkpointing", 16, *BF16, EMA, "--gradient_checkpointing"),
        rows.training("batch 16, fp16, EMA", 16, *fp16, EMA, needs_gpu=True),
        rows.training("batch 16, bf16, LoRA 16", 16, *BF16, "--lora_rank", 16, share=LORA_SHARE),
        rows.training("batch 16, fp16, LoRA 16", 16, *fp16, "--lora_rank", 16, share=LORA_SHARE, needs_gpu=True),
        rows.training("batch 16, bf16, EMA in CPU memory", 16, *BF16, EMA, "--offload_ema"),
        rows.training("batch 16, bf16, EMA, compiled", 16, *BF16, EMA, "--compile", seconds=60),
        rows.training("batch 16, pure bf16, Adafactor", 16, "--optimizer", "adafactor", "--mixed_precision",
                      "pure_bf16"),
        rows.training("batch 16, fp32, EMA", 16, EMA),
    ]  # fmt: skip


class Speed:
    """The rows of this group; they share the model and the encoded pictures."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer.usual(self.settings)

    def training(
        self, name: str, batch: int, *flags: object, seconds: float = 12, share: float = 1.0, needs_gpu: bool = False
    ) -> Measurement:
        def work() -> dict:
            if needs_gpu:
                need_gpu()
            return with_largest_batch(self.settings.batch(batch), lambda size: self.train(size, share, *flags))

        return Measurement(name, work, seconds)

    def train(self, batch: int, share: float, *flags: object) -> dict:
        started = self.trainer.start("--train_batch_size", batch, *flags)
        seconds = started.seconds_per_step(self.settings.warm_up, self.settings.timed)
        return {
            "batch": batch,
            "images/s": float(f"{batch / seconds:.3g}"),
            "ms a step": round(1000 * seconds, 1),
            **self.throughput(batch / seconds, share),
            **memory_columns(started.run),
        }

    def throughput(self, images_per_second: float, share: float) -> dict:
        """In TFLOP/s of useful work, without what checkpointing computes again."""
        if self.settings.tiny:
            return {}
        tflops = images_per_second * TFLOP_PER_SAMPLE * share
        row = Report(self.settings.out).find("machine", PEAK)
        peak = row.measured.get(PEAK_COLUMN) if row else None
        return {"TFLOP/s": round(tflops, 1), **({"% of bf16 peak": round(100 * tflops / peak)} if peak else {})}

    def limits(self) -> dict:
        """Whether the GPU waits for Python: how busy it is, and how long the host takes to make a batch."""
        need_gpu()
        return with_largest_batch(self.settings.batch(16), self.watch_gpu)

    def watch_gpu(self, batch: int) -> dict:
        started = self.trainer.start("--train_batch_size", batch, *BF16, EMA)
        started.seconds_per_step(self.settings.warm_up, 1)
        making = time.perf_counter()
        for step in range(100, 105):
            list(started.batches.for_step(step))
        synchronize()
        making = (time.perf_counter() - making) / 5
        gpu_seconds, wall, busy = watched_steps(started)
        return {
            "batch": batch,
            "ms a step": round(1000 * wall, 1),
            "ms a step by GPU events": round(1000 * gpu_seconds, 1),
            "ms to make a batch": round(1000 * making, 1),
            **busy,
        }


def watched_steps(started: Started) -> tuple[float, float, dict]:
    """Seconds a step by the GPU's events and by the clock, and what nvidia-smi says meanwhile."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with GpuSampler() as sampler:
        begun = time.perf_counter()
        first.record()
        for _ in range(BUSY_STEPS):
            started.take_step()
        last.record()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - begun) / BUSY_STEPS
    return first.elapsed_time(last) / 1000 / BUSY_STEPS, wall, sampler.summary()


class GpuSampler:
    """nvidia-smi's readings of the first card, five a second; none where it does not run."""

    FIELDS = {"GPU busy %": "utilization.gpu", "watts": "power.draw", "MHz": "clocks.sm"}

    def __enter__(self) -> "GpuSampler":
        query = f"--query-gpu={','.join(self.FIELDS.values())}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", "0", "-lms", "200"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
        return self

    def __exit__(self, *error: object) -> None:
        self.output = ""
        if self.process:
            self.process.terminate()
            self.output, _ = self.process.communicate(timeout=10)

    def summary(self) -> dict:
        """The median of each reading."""
        rows = [line.split(",") for line in self.output.splitlines() if line.count(",") == len(self.FIELDS) - 1]
        try:
            columns = zip(*([float(value) for value in row] for row in rows), strict=True)
            return {name: sorted(column)[len(column) // 2] for name, column in zip(self.FIELDS, columns, strict=False)}
        except ValueError:  # '[N/A]'
            return {}
