"""Fine-tunes a Stable Diffusion UNet on captioned pictures: `train(args)` is the whole of it, in reading order."""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

from models.loading import load_noise_scheduler, load_tokenizer, quiet_libraries
from runs.checkpoints import (
    checkpoint_step,
    complete_checkpoints,
    load_training_state,
    remove_oldest_checkpoints,
    save_checkpoint,
)
from runs.disk_space import DiskSpace, check_space, measure_space
from runs.records import output_folder, write_run
from runs.upload import prepare_upload, upload
from runtime.devices import keep_freed_memory, peak_memory_gb, supports_bf16, synchronize
from runtime.errors import UserError
from runtime.files import flush_to_disk
from runtime.locking import RunLock
from runtime.processes import CrossProcessFlag, disable_unsupported_p2p, run_on_main
from runtime.progress import format_duration, print_table
from runtime.stopping import StopSignals
from training.ema import make_ema
from training.metrics import METRICS_FILE, MetricsLog, read_metrics, start_trackers
from training.non_finite import NonFiniteSteps
from training.objective import diffusion_loss, make_objective
from training.parameters import make_parameters, make_trainable
from training.plan import Plan, describe_run, make_plan, names_of
from training.resume import ResumePoint, find_resume_point, prepare_output_folder
from training.schedule import learning_rate_schedule
from training.setup import (
    find_optimizer,
    make_batches,
    make_encodings,
    make_validator,
    optimizer_settings,
    prior_latents,
    speed_up,
)
from training.summary import closing_lines, run_summary
from training.validation import best_step

TIMED_STEPS = 2  # of a dry run, after one that warms up


def train(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Trains as `args` say (train_text_to_image.py documents them) and saves the result.

    Raises UserError before the first step where the data set, the model or the output folder is not usable, WorkError
    where the work cannot be done, Stopped after the step in which `stop` heard a signal, with a checkpoint of it.
    """
    stop = stop or StopSignals()
    # Check the data set and the model, plan the run:
    quiet_libraries()
    keep_freed_memory()
    accelerator, precision = make_accelerator(args)
    quiet = not accelerator.is_main_process
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    plan = make_plan(args, accelerator)
    noise_scheduler = load_noise_scheduler(plan.base, args.prediction_type, args.rescale_betas_zero_snr)
    objective = make_objective(args, noise_scheduler)
    tokenizer = load_tokenizer(plan.base)
    run = describe_run(args, plan, accelerator, tokenizer, precision)
    trainable = make_trainable(args.lora_rank, args.lora_alpha, run["seed"])
    rate_at = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, plan.warmup, plan.steps)
    optimizer_of = find_optimizer(args.use_8bit_adam)
    folder = output_folder(args.output_dir, args.dataset, plan.base, run["fingerprint"])

    # Go on with an earlier start of this run, or see that nothing is left to do:
    space, lock = measure_space(args, plan, tokenizer, folder), RunLock(folder)
    start = run_on_main(accelerator, lambda: look_into(args, plan, folder, run, lock))
    if start.finished(plan.steps):
        run_on_main(accelerator, lock.release)
        finish(args, folder, start.earlier, accelerator)
        return
    checkpoint, first_step = start.checkpoint, start.first_step
    run["steps"] = max(plan.steps, first_step)
    print_table(run_summary(args, plan, run, accelerator, tokenizer, folder, start, space), quiet)
    if not args.dry_run:
        run_on_main(accelerator, lambda: take_folder(args, folder, start, run, space, lock))

    # Encode what does not change, once; the VAE and the text encoder leave the memory with this:
    encodings = make_encodings(args, plan, tokenizer, accelerator, folder, quiet)
    if plan.prior_prompts:
        encodings.prior = prior_latents(args, plan, encodings, run["seed"], accelerator, precision)
    batches = make_batches(args, plan, encodings, run["seed"], len(noise_scheduler), accelerator, precision)

    # The model, its optimizer and their average, new or from a checkpoint:
    unet = trainable.load(plan.unet_base, checkpoint).to(accelerator.device).train()
    speed_up(args, unet, plan, accelerator)
    weights = make_parameters(unet, precision, accelerator.num_processes)
    average = make_ema(args, unet, weights.parameters, checkpoint)
    unwrapped, optimizer = unet, optimizer_of(weights.parameters, **optimizer_settings(args))
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:
        restore(load_training_state(checkpoint), optimizer, accelerator)

    bad_steps = NonFiniteSteps(accelerator, args.max_bad_steps, lambda step: names_of(plan, batches.pictures_of(step)))

    def take_step(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimisation step (from 0); returns its loss, the mean over all its samples on all processes, and the
        norm of its gradient. Neither is read here, so that a GPU computes while the next step is prepared."""
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        step_loss = torch.zeros((), device=accelerator.device)
        for batch, last in batches.of_step(step):
            with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                losses = diffusion_loss(unet, objective, batch)
                # The mean over all samples of the step, however they are split: processes are averaged, parts added.
                loss = losses.sum() / plan.samples_per_step
                accelerator.backward(loss * accelerator.num_processes)
            weights.collect_gradients(last)
            step_loss += loss.detach()
        step_loss = accelerator.reduce(step_loss, reduction="sum")
        norm = accelerator.clip_grad_norm_(weights.parameters, args.max_grad_norm)
        bad_steps.guard(optimizer, step_loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        weights.sync_to_model()
        average.step(weights.parameters)
        return step_loss, norm

    if args.dry_run:
        print_table([("duration", estimate(take_step, first_step, plan.steps, bad_steps))], quiet)
        return

    # Train:
    start_trackers(args, accelerator, folder)
    watch = make_validator(
        args, plan, objective, encodings, folder, accelerator, unwrapped, weights, average, batches.dtype
    )
    read_every = 1 if accelerator.device.type == "cpu" else 10
    log = MetricsLog(
        folder, first_step, plan.steps, plan.samples_per_step, read_every, quiet, bad_steps.is_bad, accelerator.log
    )
    write_checkpoint = functools.partial(
        checkpoint_run, args, folder, run, accelerator, trainable, unwrapped, weights, average, optimizer
    )
    agreement = CrossProcessFlag(accelerator, args.distributed_timeout)
    stop.defer()
    accelerator.wait_for_everyone()  # from here on all defer, or some would end while others wait for them
    for step in range(first_step, plan.steps):
        loss, norm = take_step(step)
        done = step + 1
        epoch = done * plan.global_batch / (len(plan.pictures) * args.repeats)
        log.step(done, epoch, loss, norm, rate_at(step), measure=watch.at(done))
        stopping = agreement.any_process(bool(stop.asked))
        if stopping or done % args.checkpointing_steps == 0:
            log.flush()
            log.timed_apart(functools.partial(write_checkpoint, done))
        if stopping:
            log.close()
            raise stop.stopped_after(done, plan.steps)
    log.close()

    # Save the result, with the averaged weights where there are such:
    if accelerator.is_main_process:
        average.copy_to(weights.parameters)
        with weights.full_precision():
            trainable.save_result(unwrapped, plan.base, folder, noise_scheduler)
        write_run(folder, {**run, **outcome(folder)})
        lock.release()
    accelerator.wait_for_everyone()
    stop.note_saved("after the result was saved")
    stop.stop_at_once()
    finish(args, folder, run, accelerator)


def look_into(args: argparse.Namespace, plan: Plan, folder: Path, run: dict, lock: RunLock) -> ResumePoint:
    """What is there, with no other run about that could change it meanwhile."""
    if folder.is_dir() and not args.dry_run:
        lock.take()
    return find_resume_point(args, plan, folder, run)


def take_folder(
    args: argparse.Namespace, folder: Path, start: ResumePoint, run: dict, space: DiskSpace, lock: RunLock
) -> None:  # fmt: skip
    """From here on the folder is this run's, and no other may write into it."""
    check_space(space, folder)
    lock.take()
    prepare_output_folder(folder, start, run)
    prepare_upload(args, folder)


def make_accelerator(args: argparse.Namespace) -> tuple[Accelerator, str]:
    """The accelerator and the precision: what the flag says, else what accelerate was told.

    For bf16 it is one without autocast: `trainable.MasterWeights` does its work.
    """
    for other in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "").lower() in ("1", "true", "yes"):
            raise UserError(f"accelerate was told to use {other}, which this training does not; `accelerate config`")
    report_to = args.report_to
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    trackers = None if report_to == "none" else [report_to]
    for package in ("tensorboard", "wandb", "comet_ml"):
        if report_to == package and importlib.util.find_spec(package) is None:
            raise UserError(f"--report_to {package}: not installed; `pip install {package}`")
    disable_unsupported_p2p()
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "bf16" else precision,
            log_with=trackers,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=args.distributed_timeout))],
            project_config=ProjectConfiguration("."),  # the real folder is not known yet: `start_trackers` says it
            # Batches are split here, and by what environment accelerate may bring nothing is divided again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--mixed_precision {precision}: {error}") from None
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"accelerate was told to compute in {precision}; --mixed_precision knows no, fp16 and bf16")
    if precision == "bf16" and accelerator.device.type == "cuda" and not supports_bf16():
        raise UserError("--mixed_precision bf16: this GPU does not compute in bf16; use fp16")
    return accelerator, precision


def estimate(take_step, first_step: int, steps: int, bad_steps: NonFiniteSteps) -> str:
    """How long the run will take, from two steps after one that warms up; what they learn is thrown away."""
    loss, norm = take_step(first_step)
    bad_steps.is_bad(first_step + 1, loss.item(), norm.item())
    begun = time.perf_counter()
    for _ in range(TIMED_STEPS):
        take_step(first_step)
    synchronize()
    per_step = (time.perf_counter() - begun) / TIMED_STEPS
    remaining = format_duration(per_step * (steps - first_step))
    return f"{per_step:.2f} s a step: about {remaining}; peak {peak_memory_gb():.1f} GB"


def checkpoint_run(
    args, folder: Path, run: dict, accelerator, trainable, unet, weights, average, optimizer, step: int
) -> None:
    """Written by the main process; the others wait, or they would run ahead into a collective call without it."""

    def save(part: Path) -> None:
        with weights.full_precision():
            trainable.save_checkpoint(unet, part)
        average.save_pretrained(part / "unet_ema")

    def write() -> None:
        flush_to_disk(folder / METRICS_FILE)  # a checkpoint never outlives the rows before it
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler_state(accelerator)}
        kept = {step, *map(checkpoint_step, complete_checkpoints(folder))}
        best = best_step(read_metrics(folder / METRICS_FILE), among=kept)
        best_one = {best[0]} if best else set()
        save_checkpoint(folder, step, run, save, state)
        remove_oldest_checkpoints(folder, args.checkpoints_total_limit, keep=best_one)

    run_on_main(accelerator, write)


def scaler_state(accelerator: Accelerator) -> dict | None:
    return accelerator.scaler.state_dict() if accelerator.scaler else None


def restore(state: dict, optimizer, accelerator: Accelerator) -> None:
    optimizer.load_state_dict(state["optimizer"])
    for parameter, own in optimizer.state.items():
        for name in own.keys() & {"exp_avg", "exp_avg_sq"}:  # AdamW's; what others keep has an order of its own
            if own[name].stride() != parameter.stride():
                # Saved on a device with another layout: the fused AdamW would take one weight's for another's.
                own[name] = torch.empty_like(parameter).copy_(own[name])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])


def outcome(folder: Path) -> dict:
    """What run.json says at the end of the run."""
    rows = read_metrics(folder / METRICS_FILE)
    best = best_step(rows)
    told = {"best_step": best[0], best[1]: best[2]} if best else {}
    told["skipped_steps"] = sum("skipped" in row for row in rows)
    finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return {**told, "finished": True, "finished_at": finished_at, "peak_memory_gb": peak_memory_gb()}


def finish(args: argparse.Namespace, folder: Path, run: dict, accelerator: Accelerator) -> None:
    """Says where the result is, and uploads it where asked for."""
    rows = [("finished", f"after {run['steps']} steps")]
    if best := best_step(read_metrics(folder / METRICS_FILE)):
        rows.append(("best step", f"{best[0]}, with a {best[1]} of {best[2]:.4f}{_kept(folder)}"))
    print_table([*rows, *closing_lines(folder, run)], quiet=not accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process and args.push_to_hub and not args.dry_run:
        upload(args, folder)  # the others do not wait for it


def _kept(folder: Path) -> str:
    """The checkpoint with the lowest held-out loss."""
    best = best_step(
        read_metrics(folder / METRICS_FILE), among=list(map(checkpoint_step, complete_checkpoints(folder)))
    )
    return f"; of the checkpoints, checkpoint-{best[0]} has the lowest, {best[2]:.4f}" if best else ""
