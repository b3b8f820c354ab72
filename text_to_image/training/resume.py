"""Where a run begins: at step 0, after one of its checkpoints, or not at all because it is finished."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from optimization.schedule import learning_rate_schedule
from runs.checkpoints import (
    checkpoint_fingerprint,
    checkpoint_step,
    find_checkpoint,
    foreign_checkpoints,
    later_checkpoints,
    remove_later_checkpoints,
)
from runs.disk_space import release_reserve
from runs.records import read_run, remove_run, run_differences, write_run
from runtime.errors import UserError
from runtime.files import remove_partial_files, remove_stale_partial_files
from training.plan import Plan, warmup_steps

RESULT_INDEXES = ("model_index.json", "pytorch_lora_weights.safetensors")
WHAT_TO_DO = (
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
    notes: list[str] = field(default_factory=list)  # for the run summary

    def finished(self, steps: int) -> bool:
        return bool(self.earlier and self.earlier["finished"] and self.earlier["steps"] >= steps)


def find_resume_point(args: argparse.Namespace, plan: Plan, folder: Path, record: dict) -> ResumePoint:
    """Read-only. `record` is what run.json would say of the run that is asked for.

    UserError where the folder holds another run, or the checkpoint that was asked for cannot be used.
    """
    found = read_run(folder)
    foreign = _foreign_content(folder, found, record)
    if foreign and not args.overwrite:
        raise UserError("\n  ".join([f"{folder} holds {foreign[0]}", *foreign[1:], WHAT_TO_DO]))
    same = found is not None and not foreign and not run_differences(found, record)
    earlier = found if same else None  # a run that differs and is not foreign has nothing to lose
    notes = _overwrite_notes(args.overwrite, folder, foreign, same)
    checkpoint, checkpoint_notes = _choose_checkpoint(args.resume_from_checkpoint, folder, record, earlier, foreign)
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    later = [] if foreign else later_checkpoints(folder, first_step, record["fingerprint"])
    notes += [*checkpoint_notes, *(f"removes {path.name}, which lies after step {first_step}" for path in later)]
    resume = ResumePoint(checkpoint, first_step, earlier, bool(foreign), notes)
    if not resume.finished(plan.steps):
        before = read_run(checkpoint.parent) if checkpoint else earlier
        notes += [*_changed_threads(before, record), *_changed_text(before, record)]
    if earlier and not resume.finished(plan.steps):
        _check_can_go_on(folder, earlier, checkpoint)
        notes += _changed_schedule(args, plan, earlier["steps"], first_step)
    return resume


def _foreign_content(folder: Path, found: dict | None, record: dict) -> list[str]:
    """What is in the folder that is not this run's and would be lost, in lines; empty where there is nothing."""
    changes = run_differences(found, record) if found else []
    foreign = foreign_checkpoints(folder, record["fingerprint"], own_folder=bool(found) and not changes)
    if foreign or changes and found and found.get("finished"):
        why = [] if changes or not found else ["it was made by another version of these scripts"]
        return ["another run:", *changes, *why, *(f"{path.name} is not of this run" for path in foreign)]
    own = found or later_checkpoints(folder, 0, record["fingerprint"])
    if not own and any((folder / name).is_file() for name in RESULT_INDEXES):
        return ["a model that was not trained here"]
    return []


def _overwrite_notes(overwrite: bool, folder: Path, foreign: list[str], same: bool) -> list[str]:
    if foreign:
        return [f"removes {foreign[0].rstrip(':')} from {folder}"]
    if overwrite and same:
        return ["goes on with the run that is there: it is the same, and --overwrite removes only another"]
    return []


def _check_can_go_on(folder: Path, earlier: dict, checkpoint: Path | None) -> None:
    if earlier["finished"] and not checkpoint:
        raise UserError(
            f"{folder} is finished after {earlier['steps']} steps and has no checkpoint to go on from (a run that "
            "is to go on needs --checkpointing_steps); name another --output_dir"
        )


def _choose_checkpoint(
    asked: str | None, folder: Path, record: dict, earlier: dict | None, foreign: list[str]
) -> tuple[Path | None, list[str]]:
    """(checkpoint, notes): the one that was asked for; this run's newest where none was, or where the same command has
    gone further."""
    fingerprint = record["fingerprint"]
    if asked in (None, "latest"):
        return (None, []) if foreign else find_checkpoint(asked, folder, fingerprint)
    if earlier and earlier["arguments"].get("resume_from_checkpoint") == asked:
        newest, notes = find_checkpoint("latest", folder, fingerprint)
        if newest and not _is_later(asked, folder, newest):
            return newest, [*notes, f"this command began from {asked} before, and goes on from {newest.name}"]
    checkpoint, notes = find_checkpoint(asked, folder, fingerprint)
    assert checkpoint, "one that was named is there, or UserError"
    if checkpoint.parent.resolve() != folder.resolve():
        _check_origin(checkpoint, record)
    elif foreign:
        raise UserError(f"--resume_from_checkpoint {asked}: --overwrite would remove it; leave one of them out")
    return checkpoint, notes


def _is_later(asked: str, folder: Path, newest: Path) -> bool:
    """Whether the checkpoint that was asked for is still there and lies after the newest one."""
    existing = [path for path in (folder / asked, Path(asked)) if checkpoint_fingerprint(path)]
    return bool(existing) and checkpoint_step(existing[0]) > checkpoint_step(newest)


def _check_origin(checkpoint: Path, record: dict) -> None:
    """A checkpoint of elsewhere must come from a run that differs in nothing that changes the weights."""
    if checkpoint_fingerprint(checkpoint) != record["fingerprint"]:
        origin = read_run(checkpoint.parent)
        changes = run_differences(origin, record) if origin else []
        changes = changes or ["it does not say of which run it is"]
        what = f"--resume_from_checkpoint {checkpoint} is another run's:"
        raise UserError("\n  ".join([what, *changes, "Give the arguments it had, or leave the flag out"]))


def _changed_threads(before: dict | None, record: dict) -> list[str]:
    """That the last bits may differ, where a CPU goes on with another number of threads; `before` is a run.json."""
    was, now = (before or {}).get("cpu_threads"), record["cpu_threads"]
    if not was or not now or was == now:
        return []
    return [
        f"{was} CPU threads before, now {now}: the weights may differ in their last bits from those of a run that was "
        f"not stopped; OMP_NUM_THREADS={was} keeps them"
    ]


def _changed_text(before: dict | None, record: dict) -> list[str]:
    """That captions were encoded in another precision; `before` is a run.json, of earlier versions without a word of
    it: they kept fp32."""
    was, now = (before or record).get("text_dtype", "float32"), record["text_dtype"]
    if was == now:
        return []
    return [
        f"encoded captions were kept in {was} before, now in {now}: the weights move by what that rounds off, and are "
        "not those of a run that was not stopped"
    ]


def _changed_schedule(args: argparse.Namespace, plan: Plan, before: int, first_step: int) -> list[str]:
    """What becomes of the learning rate where the run is now longer or shorter than it was meant to be."""
    if not first_step or before == plan.steps or args.lr_scheduler in ("constant", "constant_with_warmup"):
        return []
    warmup = warmup_steps(args.lr_warmup_steps, before)
    was = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, warmup, before)(first_step - 1)
    now = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, plan.warmup, plan.steps)(first_step)
    return [
        f"{before} steps were planned, now {plan.steps}: the {args.lr_scheduler} schedule is stretched to the new "
        f"length, the rate goes on at {now:.2g} where it was {was:.2g}"
    ]


def prepare_output_folder(folder: Path, resume: ResumePoint, record: dict) -> None:
    """Makes the folder ready: another run is removed, and of this one what lies after the step it goes on from."""
    remove_partial_files(folder)
    release_reserve(folder)  # of a killed run: the encodings may need its room
    for cached in folder.glob("cache/*/"):
        remove_stale_partial_files(cached)
    if resume.overwrites:
        remove_run(folder)
    remove_later_checkpoints(folder, resume.first_step, record["fingerprint"])
    write_run(folder, record)  # last: by run.json the same command knows its run
