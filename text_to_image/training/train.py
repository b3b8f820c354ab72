"""Fine-tunes a Stable Diffusion UNet on captioned pictures: `train(args)` is the whole of it, in reading order."""

import argparse
import time
from pathlib import Path

import torch

from models.compiling import compile_clause
from reporting.run_page import FINISHED
from runs.checkpoints import checkpoint_step, complete_checkpoints
from runs.commands import closing_lines
from runs.metrics_file import METRICS_FILE, best_step, read_metrics
from runs.status import write_status
from runs.upload import upload
from runtime.devices import peak_memory_gb, synchronize
from runtime.processes import run_on_all, run_on_main
from runtime.progress import format_duration, print_table
from runtime.stopping import StopSignals
from training.encoding import encode_dataset
from training.interruption import Interruption
from training.memory_rows import explain_out_of_memory
from training.metrics import MetricsLog, MetricsRow, StepResult, let_track, start_trackers
from training.non_finite import NonFiniteSteps
from training.objective import diffusion_loss
from training.samples import Batches
from training.saving import checkpoint_before_giving_up, save_result, write_checkpoint, write_rows
from training.setup import PreparedRun, claim_output_folder, make_batches, prepare_run
from training.state import TrainState
from training.summary import make_observer, print_summary
from training.validation import make_validator

TIMED_STEPS = 2  # of a dry run, after one that warms up


def train(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Trains as `args` say (train_text_to_image.py documents them) and saves the result.

    Raises UserError before the first step where the data set, the model or the output folder is not usable, WorkError
    where the work cannot be done, Stopped after the step in which `stop` received a signal, with a checkpoint of it.
    """
    stop = stop or StopSignals()
    # Check the arguments, the data set and the model, plan the run, and see where it begins:
    run = prepare_run(args)
    if run.finished_record:
        run_on_main(run.accelerator, run.lock.release)  # prepare_run has taken it
        report_result(run, run.finished_record)
        return
    summary = print_summary(run)
    if not args.dry_run:
        claim_output_folder(run)
    elif not args.timing:
        return end_dry_run(run)

    # Encode what does not change, once; the VAE and the text encoder leave the memory with this:
    encodings = encode_dataset(run)
    batches = make_batches(run, encodings)

    # The UNet, its optimizer and its EMA, new or from a checkpoint:
    state = explain_out_of_memory(TrainState.create)(run)
    non_finite = NonFiniteSteps(
        run.accelerator, args.max_bad_steps, lambda step: run.plan.names_of(batches.pictures_of(step))
    )
    if args.dry_run:
        print_table([("duration", time_steps(run, state, batches, non_finite))], quiet=not run.is_main)
        return end_dry_run(run)

    # Train:
    start_trackers(args, run.accelerator, run.folder)
    validator = run_on_all(lambda: make_validator(run, state, encodings))
    interruption = Interruption(run, stop, batches)
    stop.defer()  # from here on a signal waits for the end of the step
    run_on_all(interruption.raise_before_first_step)  # on all, or some would end while others wait for them
    log, page = MetricsLog(run), make_observer(run, validator, summary)
    with page.until(), checkpoint_before_giving_up(run, state, log, non_finite):
        log.add_pictures(0, validator.generate_base(run.resume.first_step, log.paused))
        page.follow(run.resume.first_step, True, log.paused)
        for step in range(run.resume.first_step, run.plan.steps):
            done = step + 1
            log.add(done, train_step(run, state, batches, step))
            log.add_measured(validator.measure(done, log.paused))  # after most steps nothing
            log.add_pictures(done, validator.generate(done, log.paused))
            stopping = interruption.is_due(done)
            saving = stopping or done % args.checkpointing_steps == 0
            if saving or log.is_due(done):
                write_rows(log, non_finite)
            if saving:
                with log.paused():
                    write_checkpoint(run, state, done)
            if stopping:
                log.close()
                write_status(run.accelerator, "stopped", run.folder, done, run.plan.steps)
                raise interruption.exception_after(done)
            page.follow(done, not log.pending, log.paused)
    log.close()

    # Save the result:
    if run.is_main:
        with page.until(FINISHED):
            save_result(run, state)
        run.lock.release()
    run.accelerator.wait_for_everyone()
    stop.note_saved("after the result was saved")
    stop.raise_at_once()
    report_result(run, run.record)


@explain_out_of_memory
def train_step(run: PreparedRun, state: TrainState, batches: Batches, step: int) -> StepResult:
    """One optimisation step (from 0).

    No value is copied back from the GPU here, so that it computes while the next step is prepared.
    """
    state.set_learning_rate(run.learning_rate_at(step))
    loss = torch.zeros((), device=run.accelerator.device)
    for batch, is_last in batches.for_step(step):
        with state.sync_gradients(is_last):
            losses = diffusion_loss(state.unet, run.objective, batch)
            # Divided by the samples of all processes: the micro-batches of all of them add up to the mean.
            micro_loss = losses.sum() / run.plan.samples_per_step
            state.backward(micro_loss)
        state.weights.collect_gradients(is_last)
        loss += micro_loss.detach()
    loss = run.accelerator.reduce(loss, reduction="sum")
    return StepResult(loss, state.step(loss, run.args.max_grad_norm))


def time_steps(run: PreparedRun, state: TrainState, batches: Batches, non_finite: NonFiniteSteps) -> str:
    """How long the run will take, from two steps after one that warms up; nothing of them is saved."""
    first_step = run.resume.first_step
    result = train_step(run, state, batches, first_step)
    non_finite.mark_or_raise(MetricsRow(first_step + 1, result.loss.item(), result.grad_norm.item()))
    began = time.perf_counter()
    for step in range(first_step + 1, first_step + 1 + TIMED_STEPS):
        train_step(run, state, batches, step)
    synchronize()
    per_step = (time.perf_counter() - began) / TIMED_STEPS
    remaining = format_duration(per_step * (run.plan.steps - first_step))
    return f"{per_step:.2f} s a step: about {remaining}; peak {peak_memory_gb():.1f} GB{compile_clause()}"


def end_dry_run(run: PreparedRun) -> None:
    write_status(run.accelerator, "dry_run", run.folder, run.resume.first_step, run.plan.steps)


def report_result(run: PreparedRun, record: dict) -> None:
    """Says where the result is, and uploads it where asked for; `record` is run.json's content."""
    rows = [("finished", f"after {record['steps']} steps{compile_clause()}")]
    if best := best_step(read_metrics(run.folder / METRICS_FILE)):
        rows.append(
            ("best step", f"{best[0]}, with a {best[1]} of {best[2]:.4f}{_best_checkpoint_clause(run.folder)}")
        )
    print_table([*rows, *closing_lines(run.folder, record)], quiet=not run.is_main)
    write_status(run.accelerator, "finished", run.folder, record["steps"], record["steps"])
    run.accelerator.wait_for_everyone()
    let_track(run.accelerator, run.accelerator.end_training)
    if run.is_main and run.args.push_to_hub and not run.args.dry_run:
        upload(run.args, run.folder)  # the others do not wait for it


def _best_checkpoint_clause(folder: Path) -> str:
    """The checkpoint with the lowest held-out loss."""
    existing = list(map(checkpoint_step, complete_checkpoints(folder)))
    best = best_step(read_metrics(folder / METRICS_FILE), among=existing)
    return f"; of the checkpoints, checkpoint-{best[0]} has the lowest, {best[2]:.4f}" if best else ""
