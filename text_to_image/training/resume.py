"""Where a run begins: at step 0, after one of its checkpoints, or not at all because it is finished."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from runs.checkpoints import (
    checkpoint_fingerprint,
    checkpoint_step,
    find_checkpoint,
    foreign_checkpoints,
    later_checkpoints,
    remove_later_checkpoints,
)
from runs.records import read_run, remove_run, run_differences, write_run
from runtime.errors import UserError
from runtime.files import remove_partial_files, remove_stale_partial_files
from training.plan import Plan
from training.schedule import learning_rate_schedule, warmup_steps

RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors")
ANOTHER_WAY = (
    "Give the arguments it had, or name another --output_dir (left out, each run gets a folder of its own), "
    "or begin anew in this one with --overwrite"
)


@dataclass(frozen=True)
class ResumePoint:
    """What was found in the output folder, and what follows from it."""

    checkpoint: Path | None = None
    first_step: int = 0
    earlier: dict | None = None  # run.json of an earlier start of this very run
    overwrites: bool = False  # another run is to be removed first
    notes: list[str] = field(default_factory=list)  # what is to be told of it

    def finished(self, steps: int) -> bool:
        return bool(self.earlier and self.earlier["finished"] and self.earlier["steps"] >= steps)


def find_resume_point(args: argparse.Namespace, plan: Plan, folder: Path, run: dict) -> ResumePoint:
    """Looks, and changes nothing.

    UserError where the folder holds another run, or the checkpoint that was asked for is not to be used.
    """
    earlier = read_run(folder)
    another = _another_run(folder, earlier, run)
    if another and not args.overwrite:
        raise UserError("\n  ".join([f"{folder} holds {another[0]}", *another[1:], ANOTHER_WAY]))
    notes = [f"removes {another[0].rstrip(':')} from {folder}"] if another else []
    if another or earlier and run_differences(earlier, run):
        earlier = None  # it is overwritten, or came to nothing
    elif earlier and args.overwrite:
        notes.append("goes on with the run that is there: it is the same, and --overwrite removes only another")
    checkpoint, found = _choose_checkpoint(args.resume_from_checkpoint, folder, run, earlier, bool(another))
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    later = [] if another else later_checkpoints(folder, first_step, run["fingerprint"])
    notes += [*found, *(f"removes {path.name}, which lies after step {first_step}" for path in later)]
    start = ResumePoint(checkpoint, first_step, earlier, bool(another), notes)
    if earlier and not start.finished(plan.steps):
        if earlier["finished"] and not checkpoint:
            raise UserError(
                f"{folder} is finished after {earlier['steps']} steps and has no checkpoint to go on from (a run that "
                "is to go on needs --checkpointing_steps); name another --output_dir"
            )
        notes += _changed_schedule(args, plan, earlier["steps"], start.first_step)
    return start


def _another_run(folder: Path, earlier: dict | None, run: dict) -> list[str]:
    """What is in the folder that is not this run's and would be lost, in lines; empty where there is nothing."""
    changes = run_differences(earlier, run) if earlier else []
    others = foreign_checkpoints(folder, run["fingerprint"], own_folder=bool(earlier) and not changes)
    if others or changes and earlier.get("finished"):
        why = [] if changes or not earlier else ["it was made by another version of these scripts"]
        return ["another run:", *changes, *why, *(f"{path.name} is not of this run" for path in others)]
    own = earlier or later_checkpoints(folder, 0, run["fingerprint"])
    if not own and any((folder / name).is_file() for name in RESULTS):
        return ["a model that was not trained here"]
    return []


def _choose_checkpoint(
    asked: str | None, folder: Path, run: dict, earlier: dict | None, overwrites: bool
) -> tuple[Path | None, list[str]]:
    """The one that was asked for; this run's newest where none was, or where the same command has gone further. And
    what is to be told of others."""
    if asked in (None, "latest"):
        return (None, []) if overwrites else find_checkpoint(asked, folder, run["fingerprint"])
    if earlier and earlier["arguments"].get("resume_from_checkpoint") == asked:
        newest, notes = find_checkpoint("latest", folder, run["fingerprint"])
        there = [
            path for path in (folder / asked, Path(asked)) if checkpoint_fingerprint(path)
        ]  # it may be gone by now
        if newest and not (there and checkpoint_step(there[0]) > checkpoint_step(newest)):
            return newest, [*notes, f"this command has begun from {asked} before, and goes on from {newest.name}"]
    checkpoint, notes = find_checkpoint(asked, folder, run["fingerprint"])
    if checkpoint.parent.resolve() != folder.resolve():
        _check_origin(checkpoint, run)
    elif overwrites:
        raise UserError(f"--resume_from_checkpoint {asked}: --overwrite would remove it; leave one of them out")
    return checkpoint, notes


def _check_origin(checkpoint: Path, run: dict) -> None:
    """A checkpoint of elsewhere must come from a run that differs in nothing that changes the weights."""
    if checkpoint_fingerprint(checkpoint) != run["fingerprint"]:
        origin = read_run(checkpoint.parent)
        changes = run_differences(origin, run) if origin else []
        changes = changes or ["it does not say of which run it is"]
        what = f"--resume_from_checkpoint {checkpoint} is another run's:"
        raise UserError("\n  ".join([what, *changes, "Give the arguments it had, or leave the flag out"]))


def _changed_schedule(args: argparse.Namespace, plan: Plan, before: int, first_step: int) -> list[str]:
    """What becomes of the learning rate where the run is now longer or shorter than it was meant to be."""
    if not first_step or before == plan.steps or args.lr_scheduler in ("constant", "constant_with_warmup"):
        return []
    warmup = warmup_steps(args.lr_warmup_steps, before)
    was = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, warmup, before)(first_step - 1)
    now = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, plan.warmup, plan.steps)(first_step)
    return [
        f"{before} steps were planned, now {plan.steps}: the {args.lr_scheduler} schedule is laid over all of them, "
        f"the rate goes on at {now:.2g} where it was {was:.2g}"
    ]


def prepare_output_folder(folder: Path, start: ResumePoint, run: dict) -> None:
    """Makes the folder ready: another run is removed, and of this one what lies after the step it goes on from."""
    remove_partial_files(folder)
    for cached in folder.glob("cache/*/"):
        remove_stale_partial_files(cached)
    if start.overwrites:
        remove_run(folder)
    remove_later_checkpoints(folder, start.first_step, run["fingerprint"])
    write_run(folder, run)  # at last: what it says is how the same command is known
