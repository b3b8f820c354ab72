"""metrics.jsonl, a row for each optimisation step, and the progress bar with its estimate."""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from data.images import open_image
from models.compiling import compile_clause, compile_seconds
from runs.metrics_file import METRICS_FILE
from runs.records import without_secrets
from runtime.devices import peak_memory_gb, synchronize
from runtime.errors import first_line
from runtime.files import format_size, write_error, write_text_atomically
from runtime.paths import display_path
from runtime.progress import format_duration, progress_bar
from training.setup import PreparedRun

ESTIMATE_AFTER_STEPS = 5
SMOOTHING = 0.05  # the newest loss's share of the one that the bar shows: single ones jump too much to be read
EVAL_LOSS_SUFFIXES = ("val_loss", "fixed_loss", "_ema")  # how the names of losses on fixed noise end


@dataclass(frozen=True)
class StepResult:
    """Of one optimisation step: the mean loss of all its samples on all processes, and its gradient's norm.

    Scalars that may still be on their way: reading one waits for the GPU.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor


@dataclass
class MetricsRow:
    """One optimisation step (from 1), its numbers read."""

    step: int
    train_loss: float
    grad_norm: float
    epoch: float = 0.0
    learning_rate: float = 0.0
    images_per_second: float = 0.0
    skipped: bool = False
    measured: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict:
        return {
            "step": self.step,
            "epoch": round(self.epoch, 4),
            "train_loss": self.train_loss if math.isfinite(self.train_loss) else None,
            "lr": self.learning_rate,
            "images_per_second": float(f"{self.images_per_second:.3g}"),
            "peak_memory_gb": round(peak_memory_gb(), 2),
            **({"skipped": True} if self.skipped else {}),
            **self.measured,
        }


class MetricsLog:
    """Rows for metrics.jsonl and the progress bar over the optimisation steps of a run.

    Results are kept as tensors and read when a row is due, every tenth step on a GPU. All processes read them; the
    main process writes.
    """

    def __init__(self, run: PreparedRun):
        self.run = run
        self.path = run.folder / METRICS_FILE
        self.read_every = 1 if run.accelerator.device.type == "cpu" else 10
        self.pending: list[tuple[int, torch.Tensor, dict[str, float]]] = []
        self.pictures: list[tuple[int, list[Path]]] = []  # (step, files) that nobody was told of yet
        self.unwritten: list[str] = []  # lines that the disk has refused
        self.started = self.collected_at = time.perf_counter()
        self.last_collected_step = run.resume.first_step
        self.estimated = False
        self.smoothed_loss = 0.0
        first_step, steps = run.resume.first_step, run.plan.steps
        self.step = first_step  # the last one that was added
        self.bar = progress_bar(total=steps, initial=first_step, desc="training", unit="step", disable=not run.is_main)
        if run.is_main:
            keep_rows(self.path, first_step)

    def add(self, step: int, result: StepResult) -> None:
        """Notes optimisation step `step` (from 1)."""
        self.step = step
        self.pending.append((step, torch.stack([result.loss.detach(), result.grad_norm.detach()]), {}))
        self.bar.update()

    def add_measured(self, losses: dict[str, float]) -> None:
        """Notes what was measured after the last step."""
        self.pending[-1][2].update(losses)

    def add_pictures(self, step: int, files: Sequence[Path]) -> None:
        """Notes what was generated after step `step`; 0: by the base."""
        self.pictures += [(step, list(files))] if files else []

    def is_due(self, step: int) -> bool:
        return len(self.pending) >= self.read_every or step == self.run.plan.steps

    def collect_rows(self) -> list[MetricsRow]:
        """The rows of the steps that were added since the last time; waits for the device."""
        pending, self.pending = self.pending, []
        if not pending:
            return []
        numbers = torch.stack([loss_and_norm for _, loss_and_norm, _ in pending]).tolist()
        now = time.perf_counter()
        rate = self.run.plan.samples_per_step * len(pending) / (now - self.collected_at)
        self.collected_at, self.last_collected_step = now, pending[-1][0]
        return [
            MetricsRow(
                step, loss, norm, self.run.epoch_after(step), self.run.learning_rate_at(step - 1), rate,
                measured=measured,
            )
            for (step, _, measured), (loss, norm) in zip(pending, numbers, strict=True)
        ]  # fmt: skip

    def write(self, row: MetricsRow) -> None:
        """Into the file, to the trackers and onto the bar. What the disk refuses, `flush` tries again."""
        if not self.run.is_main:
            return
        written = row.as_json()
        self.unwritten.append(json.dumps(written) + "\n")
        with contextlib.suppress(OSError):
            self._write_lines()
        self._show_pictures(row.step)
        values = {name: value for name, value in written.items() if name != "step"}
        let_track(self.run.accelerator, lambda: self.run.accelerator.log(values, row.step))
        if math.isfinite(row.train_loss):
            self.smoothed_loss += (row.train_loss - self.smoothed_loss) * (SMOOTHING if self.smoothed_loss else 1)
        self.bar.set_postfix_str(
            f"loss={self.smoothed_loss:.4f} lr={row.learning_rate:.1e} images/s={row.images_per_second:.3g} "
            f"{peak_memory_gb():.1f} GB",
            refresh=False,
        )
        if measured := [
            f"{name}={value:.4f}" for name, value in row.measured.items() if name.endswith(EVAL_LOSS_SUFFIXES)
        ]:
            self.bar.write(f"step {row.step}: {' '.join(measured)}", file=sys.stdout)
        self._estimate(row.step)

    def _show_pictures(self, step: int) -> None:
        """Those up to `step` on the console and to the trackers, which take steps in order only."""
        due = [generated for generated in self.pictures if generated[0] <= step]
        self.pictures = self.pictures[len(due) :]
        for generated_at, files in due:
            more = f" and {len(files) - 1} more" if files[1:] else ""
            self.bar.write(f"step {generated_at}: generated {display_path(files[0])}{more}", file=sys.stdout)
            let_track(self.run.accelerator, functools.partial(self._track_pictures, generated_at, files))

    def _track_pictures(self, step: int, files: Sequence[Path]) -> None:
        pictures = {f"validation/{index}": np.asarray(open_image(file))[None] for index, file in enumerate(files)}
        for tracker in self.run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # wandb takes no other
                tracker.log_images(pictures, step=step, **layout)

    def flush(self) -> None:
        """All rows are in the file, or WriteError."""
        try:
            self._write_lines()
        except OSError as error:
            needed = f"more than {format_size(len(''.join(self.unwritten)))}"
            raise write_error(self.path.parent, self.path.name, error, needed) from None

    def _write_lines(self) -> None:
        if self.unwritten:
            append_whole(self.path, "".join(self.unwritten))
            self.unwritten = []

    def _estimate(self, step: int) -> None:
        """Once, for the step whose loss was just read: until then the GPU may lag behind the steps counted here."""
        first_step = self.run.resume.first_step
        if self.estimated or step != self.last_collected_step or step < first_step + ESTIMATE_AFTER_STEPS:
            return
        self.estimated = True
        per_step = (self.collected_at - self.started - compile_seconds()) / (step - first_step)
        remaining = format_duration(per_step * (self.run.plan.steps - step))
        self.bar.write(f"{per_step:.2f} s a step: about {remaining} to go{compile_clause()}", file=sys.stdout)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work between steps, whose time counts neither in images/s nor in the estimate."""
        synchronize()  # or the steps that the device still works on would count as this work
        began, compiled = time.perf_counter(), compile_seconds()
        yield
        seconds = time.perf_counter() - began
        self.collected_at += seconds
        self.started += seconds - (compile_seconds() - compiled)  # `_estimate` takes off all that was compiled

    def close(self) -> None:
        self.bar.close()


def let_track(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Has the tracker do its `work`. One that fails is left out from then on, with a line: it never ends a run."""
    try:
        work()
    except Exception as error:  # a service's or a disk's; they have no common class
        accelerator.trackers = []
        print(f"warning: --report_to: {first_line(error)}; the run goes on without the tracker", file=sys.stderr)


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> None:
    """Starts the tracker of --report_to; secrets are left out of its config."""
    if args.report_to == "none":
        return
    arguments = without_secrets({name: value for name, value in vars(args).items() if name != "origins"})
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(folder / args.logging_dir)
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in arguments.items()}
    threading.excepthook = _ignore_tensorboard(threading.excepthook)
    let_track(accelerator, lambda: accelerator.init_trackers(args.tracker_project_name, config=plain))


def _ignore_tensorboard(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable:
    """`hook` without the thread in which tensorboard writes: its failure is also raised where it is next called."""

    def ignoring(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            hook(args)

    return ignoring


def append_whole(path: Path, text: str) -> None:
    """Appends `text` to a file, or leaves it as it was and raises OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def keep_rows(path: Path, last_step: int) -> None:
    """Drops the rows after `last_step`, which a resumed run writes again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    write_text_atomically(path, "".join(line for line in lines if _step_of(line) <= last_step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut in two
