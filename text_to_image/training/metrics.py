"""What a run says: the start table, the progress bar with its estimate, and metrics.jsonl."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from runs.records import without_secrets
from runtime.devices import peak_memory_gb, synchronize
from runtime.files import write_text_atomically
from runtime.progress import format_duration, progress_bar

METRICS_FILE = "metrics.jsonl"
ESTIMATE_AFTER_STEPS = 5
SMOOTHING = 0.05  # the newest loss's share of the one that the bar shows: single ones jump too much to be read
MEASURED = ("val_loss", "fixed_loss", "_ema")  # how the names of losses on fixed noise end


def origins_line(arguments: dict, origins: dict[str, str], source: str) -> str:
    """The arguments that come from `source`: name=value, of a list only how many."""
    chosen = {name: arguments[name] for name, origin in without_secrets(origins).items() if origin == source}
    briefly = (f"{name}={f'({len(value)})' if isinstance(value, list) else value}" for name, value in chosen.items())
    return " ".join(briefly) or "none"


def start_trackers(args: argparse.Namespace, accelerator, folder: Path) -> None:
    """None of them ever sees a token."""
    if args.report_to == "none":
        return
    told = without_secrets({name: value for name, value in vars(args).items() if name != "origins"})
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(folder / args.logging_dir)
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in told.items()}
    accelerator.init_trackers(args.tracker_project_name, config=plain)


class MetricsLog:
    """Rows for metrics.jsonl and the progress bar over optimisation steps.

    Losses and gradient norms are kept as tensors and read every `read_every` steps: reading one waits for the GPU.
    """

    def __init__(
        self, folder: Path, first_step: int, steps: int, images_per_step: int, read_every: int, quiet: bool,
        is_bad: Callable[[int, float, float], bool] = lambda step, loss, norm: False,
        track: Callable[[dict, int], None] = lambda row, step: None,
    ):  # fmt: skip
        self.path = None if quiet else folder / METRICS_FILE
        self.first_step, self.steps, self.images_per_step = first_step, steps, images_per_step
        self.read_every = read_every
        self.is_bad = is_bad  # asked about each step's loss and gradient norm when they are read; may end the run
        self.track = track  # also told each row, with its step
        self.waiting: list[tuple[int, float, torch.Tensor, float, dict]] = []
        self.started = self.read_at = time.perf_counter()
        self.estimated = False
        self.smoothed = 0.0
        self.bar = progress_bar(total=steps, initial=first_step, desc="training", unit="step", disable=quiet)
        if self.path:
            keep_rows(self.path, first_step)

    def step(
        self, step: int, epoch: float, train_loss: torch.Tensor, norm: torch.Tensor, lr: float,
        measure: Callable[[], dict] | None = None,
    ) -> None:  # fmt: skip
        """Notes optimisation step `step` (from 1), done; `train_loss` and the gradient's `norm` are scalars that may
        still be on their way.

        What `measure` finds after the step goes into its row; the time that measuring takes is not the steps'.
        """
        found = self.timed_apart(measure) if measure else {}
        self.waiting.append((step, epoch, torch.stack([train_loss.detach(), norm.detach()]), lr, found))
        self.bar.update()
        if len(self.waiting) >= self.read_every or step == self.steps:
            self.flush()

    def timed_apart(self, work: Callable[[], dict | None]) -> dict | None:
        """Does the work and returns what it returns; the time it takes is not the steps'."""
        synchronize()  # or the steps that it still works on would count as this work
        begun = time.perf_counter()
        found = work()
        took = time.perf_counter() - begun
        self.started, self.read_at = self.started + took, self.read_at + took
        return found

    def flush(self) -> None:
        """Reads the losses that wait and writes their rows, up to one that ends the run."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        read = torch.stack([values for _, _, values, *_ in waiting]).tolist()
        now = time.perf_counter()
        rate = self.images_per_step * len(waiting) / (now - self.read_at)
        rows = []
        try:
            for (step, epoch, _, lr, measured), (loss, norm) in zip(waiting, read, strict=True):
                skipped = {"skipped": True} if self.is_bad(step, loss, norm) else {}
                rows.append(
                    {"step": step, "epoch": round(epoch, 4), "train_loss": loss if math.isfinite(loss) else None,
                     "lr": lr, "images_per_second": float(f"{rate:.3g}"),
                     "peak_memory_gb": round(peak_memory_gb(), 2), **skipped, **measured}
                )  # fmt: skip
        finally:
            if self.path and rows:
                self._tell(rows, rate)
        self._estimate(waiting[-1][0])
        self.read_at = now

    def _tell(self, rows: Sequence[dict], rate: float) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.track({name: value for name, value in row.items() if name != "step"}, row["step"])
            if (loss := row["train_loss"]) is not None:
                self.smoothed += (loss - self.smoothed) * (SMOOTHING if self.smoothed else 1)
        self.bar.set_postfix_str(
            f"loss={self.smoothed:.4f} lr={rows[-1]['lr']:.1e} images/s={rate:.3g} {peak_memory_gb():.1f} GB",
            refresh=False,
        )
        self._say_measured(rows)

    def _say_measured(self, rows: Sequence[dict]) -> None:
        for row in rows:
            if measured := [f"{name}={value:.4f}" for name, value in row.items() if name.endswith(MEASURED)]:
                self.bar.write(f"step {row['step']}: {' '.join(measured)}", file=sys.stdout)

    def _estimate(self, step: int) -> None:
        """Once, and only right after losses were read: until then the GPU may lag behind the steps counted here."""
        if self.estimated or not self.path or step < self.first_step + ESTIMATE_AFTER_STEPS:
            return
        self.estimated = True
        per_step = (time.perf_counter() - self.started) / (step - self.first_step)
        text = f"{per_step:.2f} s a step: about {format_duration(per_step * (self.steps - step))} to go"
        self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self.flush()
        self.bar.close()


def keep_rows(path: Path, last_step: int) -> None:
    """Drops the rows after `last_step`, which a resumed run writes again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    write_text_atomically(path, "".join(line for line in lines if _step_of(line) <= last_step))


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut in two
