"""Checkpoints of a run: whole or absent, because they are written beside and renamed when their manifest is in them.

OUTPUT/checkpoint-N/ holds unet/ and unet_ema/ (both load with `UNet2DConditionModel.from_pretrained`), the optimizer's
state, and manifest.json with every file's size and SHA-256.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from runtime.errors import UserError, WorkError, first_line, is_disk_full
from runtime.files import flush_to_disk

MANIFEST, STATE = "manifest.json", "training_state.pt"
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial-"


def save_checkpoint(
    folder: Path,
    step: int,
    run: dict,
    save: Callable[[Path], object],
    training_state: dict,
    limit: int | None,
    keep: set[int],
) -> Path:
    """Writes checkpoint-`step` and then, where `limit` says how many to keep, removes the oldest beyond it.

    `save` writes the weights into the folder it is given; of `run`, run.json's content, the manifest keeps what was
    trained and the fingerprint. The checkpoints of the steps in `keep` are never removed. The new one is read back
    for its hashes before an old one goes. WorkError where it cannot be written: then nothing of it stays, and the
    others do.
    """
    part, whole = folder / f"{PARTIAL}{step}", folder / f"checkpoint-{step}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        save(part)
        torch.save(training_state, part / STATE)
        for path in sorted(part.rglob("*")):
            flush_to_disk(path)
        files = _facts({str(path.relative_to(part)): path for path in _files(part)})
        manifest = {"step": step, "trained": run["trained"], "fingerprint": run["fingerprint"], "files": files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2))
        flush_to_disk(part / MANIFEST)
        flush_to_disk(part)
        shutil.rmtree(whole, ignore_errors=True)
        os.replace(part, whole)
        flush_to_disk(folder)
        if missing := missing_files(whole):
            raise OSError(f"what was written is not there: {missing}")
    except Exception as error:
        written = sum(path.stat().st_size for path in _files(part))
        free = shutil.disk_usage(folder).free
        shutil.rmtree(part, ignore_errors=True)
        raise _not_written(error, folder, step, written, free) from None
    for old in complete_checkpoints(folder)[: -limit if limit else 0]:
        if checkpoint_step(old) not in keep:
            _remove(old)
    return whole


def _remove(checkpoint: Path) -> None:
    """Renamed first: what a kill leaves of it is no checkpoint any more, and goes with the next start."""
    going = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going, ignore_errors=True)


def _not_written(error: Exception, folder: Path, step: int, written: int, free: int) -> Exception:
    """A WorkError that says what is needed, where the disk is to blame; else the error as it is."""
    if not (is_disk_full(error) or isinstance(error, OSError)):
        return error
    complete = complete_checkpoints(folder)
    needed = f"about {_gb(_size(complete[-1]))}" if complete else f"more than {_gb(written)}"
    last = complete[-1].name if complete else "none yet"
    return WorkError(
        f"{folder}: checkpoint-{step} could not be written ({first_line(error)}): it needs {needed}, {_gb(free)} were "
        f"free when {_gb(written)} of it were written, which are removed; the last good checkpoint: {last}. Make "
        "room, or see to the permissions, and run the same command again"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _facts(files: dict[str, Path]) -> dict[str, dict]:
    """Each file's size and hash, as read from the disk; several at once, since hashing takes longer than reading."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, files.values()))
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), hashes, strict=True)
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run with every file of their manifest, oldest step first; contents are not read."""
    return [path for path in _named(folder) if not missing_files(path)]


def _named(folder: Path) -> list[Path]:
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def missing_files(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of its manifest, by the sizes of its files; None where it is complete."""
    try:
        files = _manifest(checkpoint)["files"].items()
        for name, facts in files:
            path = checkpoint / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                return f"{name} has {size} of {facts['bytes']} bytes" if size is not None else f"{name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    return None


def find_damage(checkpoint: Path) -> str | None:
    """As `what_is_missing`, but every file is read and its hash compared."""
    if missing := missing_files(checkpoint):
        return missing
    files = _manifest(checkpoint)["files"]
    found = _facts({name: checkpoint / name for name in files})
    changed = [name for name, facts in files.items() if found[name]["sha256"] != facts["sha256"]]
    return f"{changed[0]} is damaged: its SHA-256 is not the manifest's" if changed else None


def checkpoint_step(checkpoint: Path) -> int:
    return _manifest(checkpoint)["step"]


def _manifest(checkpoint: Path) -> dict:
    return json.loads((checkpoint / MANIFEST).read_text())


def remove_later_checkpoints(folder: Path, step: int, fingerprint: str) -> None:
    """A run that goes on from `step` writes its checkpoints after it anew; what is left of them would mix two starts.

    What a kill has left of one that was being written or removed goes as well; what is not this run's stays.
    """
    for checkpoint in later_checkpoints(folder, step, fingerprint):
        _remove(checkpoint)
    for part in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(part, ignore_errors=True)


def later_checkpoints(folder: Path, step: int, fingerprint: str) -> list[Path]:
    """Those of the run with this fingerprint that lie after `step`."""
    return [
        path for path in _named(folder) if checkpoint_fingerprint(path) == fingerprint and checkpoint_step(path) > step
    ]


def checkpoint_fingerprint(checkpoint: Path) -> str | None:
    """Of the run that wrote it; None where it does not say."""
    try:
        return _manifest(checkpoint)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def foreign_checkpoints(folder: Path, fingerprint: str, own_folder: bool) -> list[Path]:
    """The checkpoints in `folder` that another run or program wrote; one without a readable manifest counts as damaged
    in the run's `own_folder`."""
    found = {path: checkpoint_fingerprint(path) for path in _named(folder)}
    return [path for path, of in found.items() if of != fingerprint and not (own_folder and of is None)]


def find_checkpoint(asked: str | None, folder: Path, fingerprint: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None to begin at step 0; and a line for each one that was found and not taken.

    `asked` is a path, the name of a checkpoint in `folder`, or 'latest' (also None): the last undamaged one there of
    the run with this fingerprint, if there is one. UserError where one was named that is not there or not whole.
    """
    if asked in (None, "latest"):
        return _latest(folder, fingerprint)
    for checkpoint in (folder / asked, Path(asked)):
        if checkpoint.is_dir():
            if damaged := find_damage(checkpoint):
                raise UserError(f"--resume_from_checkpoint {asked}: {checkpoint} is not whole: {damaged}")
            return checkpoint, []
    names = ", ".join(path.name for path in complete_checkpoints(folder)) or "none"
    raise UserError(f"--resume_from_checkpoint {asked}: no such folder; complete checkpoints in {folder}: {names}")


def _latest(folder: Path, fingerprint: str) -> tuple[Path | None, list[str]]:
    cut = sorted(path for path in folder.glob(f"{PARTIAL}*") if path.name.removeprefix(PARTIAL).isdigit())
    notes = [f"{path.name} was being written when the run ended: not taken" for path in cut]
    for checkpoint in reversed(_named(folder)):
        damaged = find_damage(checkpoint)
        if not damaged and checkpoint_fingerprint(checkpoint) == fingerprint:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} is {f'not whole ({damaged})' if damaged else 'of another run'}: not taken")
    return None, notes


def load_training_state(checkpoint: Path) -> dict:
    """Optimizer, and scaler where there is one; a file of ours, and still nothing in it can run code."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
