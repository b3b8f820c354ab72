"""What training saves: checkpoints, also one before a run gives up, and the result, whole or not at all."""

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runs.checkpoints import (
    PARTIAL,
    checkpoint_step,
    complete_checkpoints,
    remove_checkpoint,
    remove_oldest_checkpoints,
    save_checkpoint,
)
from runs.disk_space import hold_reserve, release_reserve
from runs.metrics_file import METRICS_FILE, best_step, read_metrics
from runs.records import KEPT_UNETS, write_run
from runtime.devices import peak_memory_gb
from runtime.errors import WorkError, WriteError, advice_for, first_line, is_disk_full
from runtime.files import flush_to_disk, format_size, size_on_disk, write_error
from runtime.processes import run_on_main
from training.metrics import MetricsLog
from training.non_finite import NonFiniteSteps
from training.setup import PreparedRun
from training.state import TrainState

RESULT = f"{PARTIAL}result"  # the folder that the result is written into; the next start removes what a kill left


def write_rows(log: MetricsLog, non_finite: NonFiniteSteps) -> None:
    """The rows of all steps that have none yet; WriteError where the disk refuses them."""
    for row in log.collect_rows():
        non_finite.mark_or_raise(row)
        log.write(row)
    log.flush()


def write_checkpoint(run: PreparedRun, state: TrainState, step: int) -> None:
    """Only the main process writes; the others wait, so that none starts a collective call without it."""

    def write() -> None:
        existing = {step, *_steps_with_checkpoint(run.folder)}
        best = best_step(read_metrics(run.folder / METRICS_FILE), among=existing)
        _save_checkpoint(run, state, step)
        remove_oldest_checkpoints(run.folder, run.args.checkpoints_total_limit, keep={best[0]} if best else set())
        hold_reserve(run.folder, run.space)

    run_on_main(run.accelerator, write)


def _save_checkpoint(run: PreparedRun, state: TrainState, step: int) -> Path:
    release_reserve(run.folder)
    if (run.folder / METRICS_FILE).is_file():
        flush_to_disk(run.folder / METRICS_FILE)  # the rows before a checkpoint reach the disk before it does
    return save_checkpoint(run.folder, step, run.record, state.save_weights, state.saved_state())


def _steps_with_checkpoint(folder: Path) -> list[int]:
    return [checkpoint_step(checkpoint) for checkpoint in complete_checkpoints(folder)]


# --- When a file cannot be written ----------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint_before_giving_up(
    run: PreparedRun, state: TrainState, log: MetricsLog, non_finite: NonFiniteSteps
) -> Iterator[None]:
    """Tries a checkpoint of the last whole step where, within the block, a file cannot be written or read.

    Raises WorkError that says what happened and where the run will go on. The main process does it alone: the others
    may be in the middle of a step, and end when it does. Room for the checkpoint is held in reserve, also beyond the
    block: `save_result` releases it.
    """
    if not run.is_main:
        yield
        return
    hold_reserve(run.folder, run.space)
    try:
        yield
    except BaseException as error:
        release_reserve(run.folder)
        if not isinstance(error, OSError | WriteError):
            raise
        saved = _try_checkpoint(run, state, log, non_finite)
        log.close()
        raise WorkError(f"{first_line(error)}; {saved}") from None


def _try_checkpoint(run: PreparedRun, state: TrainState, log: MetricsLog, non_finite: NonFiniteSteps) -> str:
    """Returns where the run will go on."""
    with contextlib.suppress(OSError, WorkError):  # a checkpoint is worth more than its rows
        write_rows(log, non_finite)
    try:
        if log.step not in [run.resume.first_step, *_steps_with_checkpoint(run.folder)]:
            _save_checkpoint(run, state, log.step)
    except (OSError, WorkError):
        needed = format_size(run.space.checkpoint)
        return (
            f"step {log.step} could not be saved either, which takes about {needed}; {_where_it_goes_on(run.folder)}"
        )
    return _where_it_goes_on(run.folder)


def _where_it_goes_on(folder: Path) -> str:
    steps = _steps_with_checkpoint(folder)
    return f"it goes on from checkpoint-{steps[-1]}" if steps else "there is no checkpoint, so it begins anew"


# --- The result -----------------------------------------------------------------------------------------------------


def save_result(run: PreparedRun, state: TrainState) -> None:
    """The result, with the averaged weights where there is an EMA, and run.json, which says that it is finished.

    Until both are there, a checkpoint of the last step is. WorkError where the disk refuses them.
    """
    release_reserve(run.folder)
    own_checkpoint = _save_last_checkpoint(run, state, run.record["steps"])
    with state.final_unet() as unet:
        try:
            run.trainable.save_result(unet, run.plan.base, run.folder / RESULT, run.objective.noise_scheduler)
            _move_content(run.folder / RESULT, run.folder)
        except Exception as error:
            raise _failed_result(run, error) from None
        finally:
            shutil.rmtree(run.folder / RESULT, ignore_errors=True)
    write_run(run.folder, {**run.record, **outcome(run.folder)})
    for kept in run.folder.glob(KEPT_UNETS):
        shutil.rmtree(kept, ignore_errors=True)
    if own_checkpoint:
        remove_checkpoint(own_checkpoint)


def _save_last_checkpoint(run: PreparedRun, state: TrainState, step: int) -> Path | None:
    """Returns its folder; None where it is there already, or would take the room that the result needs."""
    free = shutil.disk_usage(run.folder).free
    only_the_result_fits = run.space.result <= free < run.space.result + run.space.checkpoint
    if only_the_result_fits or step in _steps_with_checkpoint(run.folder):
        return None
    with contextlib.suppress(OSError, WorkError):  # the result fails too, and says why
        return _save_checkpoint(run, state, step)
    return None


def _move_content(source: Path, target: Path) -> None:
    """What of the same name is in `target` goes. Flushed to the disk first: a quota may be noticed only then."""
    for path in source.rglob("*"):
        flush_to_disk(path)
    # The UNet after what can be had from the base, and model_index.json after the folders that it names:
    for path in sorted(source.iterdir(), key=lambda path: (path.is_file(), path.name == "unet")):
        shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def _failed_result(run: PreparedRun, error: Exception) -> WorkError:
    """The error that says what happened and where the trained weights are."""
    if isinstance(error, WriteError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if is_disk_full(error) or isinstance(error, OSError):
        needed, removed = f"about {format_size(run.space.result)}", size_on_disk(run.folder / RESULT)
        failed: object = write_error(run.folder, "the result", error, needed, removed)
    else:
        failed = f"{run.folder}: the result could not be saved: {advice_for(error) or first_line(error)}"
    return WorkError(f"{failed}; {_where_the_weights_are(run)}")


def _where_the_weights_are(run: PreparedRun) -> str:
    """In the checkpoint of the last step; where there was no room for it, the UNet of the result is kept."""
    steps, unet = run.record["steps"], run.folder / RESULT / "unet"
    if steps in _steps_with_checkpoint(run.folder):
        return f"what was trained is whole in checkpoint-{steps}, from which it goes on"
    if not unet.is_dir():
        return _where_it_goes_on(run.folder)
    kept = run.folder / KEPT_UNETS.replace("*", str(steps))
    shutil.rmtree(kept, ignore_errors=True)
    unet.rename(kept)
    return f"the trained UNet is whole in {kept}; {_where_it_goes_on(run.folder)}"


def outcome(folder: Path) -> dict:
    """What run.json says at the end of the run."""
    rows = read_metrics(folder / METRICS_FILE)
    best = best_step(rows)
    summary: dict[str, int | float] = {"best_step": best[0], best[1]: best[2]} if best else {}
    summary["skipped_steps"] = sum("skipped" in row for row in rows)
    finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return {**summary, "finished": True, "finished_at": finished_at, "peak_memory_gb": peak_memory_gb()}
