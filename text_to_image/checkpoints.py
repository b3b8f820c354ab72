"""Checkpoints of a run: whole or absent, because they are written beside and renamed when their manifest is in them.

OUTPUT/checkpoint-N/ holds unet/ and unet_ema/ (both load with `UNet2DConditionModel.from_pretrained`), the optimizer's
state, and manifest.json with every file's size.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from errors import UserError

MANIFEST, STATE = "manifest.json", "training_state.pt"
NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    trained: str,
    save: Callable[[Path], object],
    training_state: dict,
    limit: int | None,
    keep: set[int],
) -> Path:
    """Writes checkpoint-`step` and then, where `limit` says how many to keep, removes the oldest beyond it.

    `save` writes the weights, of what `trained` names, into the folder it is given; the checkpoints of the steps in
    `keep` are never removed.
    """
    part, whole = folder / f".partial-{step}", folder / f"checkpoint-{step}"
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    torch.save(training_state, part / STATE)
    sizes = {str(path.relative_to(part)): path.stat().st_size for path in sorted(part.rglob("*")) if path.is_file()}
    (part / MANIFEST).write_text(json.dumps({"step": step, "trained": trained, "files": sizes}, indent=2))
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(part, whole)
    for old in complete_checkpoints(folder)[: -limit if limit else 0]:
        if step_of(old) not in keep:
            shutil.rmtree(old)
    return whole


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of its manifest is there with its size."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    return _manifest(checkpoint)["step"]


def _manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text())


def remove_later(folder: Path, step: int) -> None:
    """A run that goes on from `step` writes the checkpoints after it anew; what is left of them would mix two runs."""
    for checkpoint in complete_checkpoints(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def find_checkpoint(asked: str | None, folder: Path, trained: str = "UNet") -> Path | None:
    """The checkpoint to go on from, or None to begin at step 0.

    `asked` is a path, the name of a checkpoint in `folder`, or 'latest' (also None): the last complete one there, if
    there is one. UserError where one was named that is not there, not complete, or of something else than `trained`.
    """
    if asked in (None, "latest"):
        return (complete_checkpoints(folder) or [None])[-1]
    for checkpoint in (folder / asked, Path(asked)):
        if checkpoint.is_dir():
            if not is_complete(checkpoint):
                raise UserError(f"--resume_from_checkpoint {asked}: {checkpoint} is not complete")
            if (found := _manifest(checkpoint)["trained"]) != trained:
                raise UserError(f"--resume_from_checkpoint {asked}: holds a {found}, this run trains a {trained}")
            return checkpoint
    names = ", ".join(path.name for path in complete_checkpoints(folder)) or "none"
    raise UserError(f"--resume_from_checkpoint {asked}: no such folder; complete checkpoints in {folder}: {names}")


def load_training_state(checkpoint: Path) -> dict:
    """Optimizer, and scaler where there is one; a file of ours, and still nothing in it can run code."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
