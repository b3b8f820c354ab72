"""Checkpoints of a run. Each is complete or absent: written under another name, renamed once its manifest is in it.

OUTPUT/checkpoint-N/ holds unet/ and unet_ema/ (both load with `UNet2DConditionModel.from_pretrained`), the state of
the optimizer, and manifest.json with the size and SHA-256 of every file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from runtime.errors import UserError, WorkError, first_line, is_disk_full
from runtime.files import flush_to_disk, format_size, size_on_disk, what_helps

MANIFEST, STATE = "manifest.json", "training_state.pt"
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial-"
HASH_THREADS = 4  # hashing takes longer than reading


def save_checkpoint(
    folder: Path,
    step: int,
    record: Mapping[str, Any],
    save_weights: Callable[[Path], object],
    training_state: Mapping[str, Any],
) -> Path:
    """Writes checkpoint-`step` and reads it back for its hashes; returns its folder.

    `save_weights` writes the weights into the folder it is given. Of `record`, the content of run.json, the manifest
    keeps what was trained and the fingerprint. Raises WorkError if the disk refuses it: then nothing of it stays, and
    the earlier checkpoints do.
    """
    partial, checkpoint = folder / f"{PARTIAL}{step}", folder / f"checkpoint-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_weights(partial)
        torch.save(training_state, partial / STATE)
        _write_manifest(partial, {"step": step, "trained": record["trained"], "fingerprint": record["fingerprint"]})
        _rename(partial, checkpoint)
    except Exception as error:
        written, free = size_on_disk(partial), shutil.disk_usage(folder).free
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error) or isinstance(error, OSError):
            raise WorkError(_describe_failed_write(error, checkpoint, written, free)) from None
        raise
    return checkpoint


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Flushes everything in `folder` to disk, then writes the manifest of it."""
    for path in sorted(folder.rglob("*")):
        flush_to_disk(path)
    files = _sizes_and_hashes({str(path.relative_to(folder)): path for path in _list_files(folder)})
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2))
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def _rename(partial: Path, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(partial, checkpoint)
    flush_to_disk(checkpoint.parent)
    if missing := find_missing_file(checkpoint):
        raise OSError(f"after it was written, {missing}")


def _describe_failed_write(error: Exception, checkpoint: Path, written: int, free: int) -> str:
    complete = complete_checkpoints(checkpoint.parent)
    needed = f"about {format_size(size_on_disk(complete[-1]))}" if complete else f"more than {format_size(written)}"
    last = complete[-1].name if complete else "none yet"
    return (
        f"{checkpoint.parent}: {checkpoint.name} could not be written ({first_line(error)}): it needs {needed}, "
        f"{format_size(free)} were free after {format_size(written)} of it, which are removed now; the last good "
        f"checkpoint: {last}; {what_helps(str(error))}, or check the permissions, and run the same command again"
    )


def remove_oldest_checkpoints(folder: Path, limit: int | None, keep: Collection[int]) -> None:
    """Keeps the `limit` newest complete checkpoints (None: all) and those of the steps in `keep`."""
    for checkpoint in complete_checkpoints(folder)[: -limit if limit else 0]:
        if checkpoint_step(checkpoint) not in keep:
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Renames it first, so that a kill in between leaves no damaged checkpoint; the next start removes the rest."""
    renamed = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(checkpoint, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sizes_and_hashes(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": ..., "sha256": ...}} of the files as they are on the disk."""
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, files.values()))
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), hashes, strict=True)
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have every file of their manifest, lowest step first. Reads no contents."""
    return [path for path in _list_checkpoints(folder) if not find_missing_file(path)]


def _list_checkpoints(folder: Path) -> list[Path]:
    """All folders named checkpoint-N, lowest N first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_missing_file(checkpoint: Path) -> str | None:
    """Describes the first file of the manifest that is missing or of the wrong size; None if there is none."""
    try:
        for name, facts in _read_manifest(checkpoint)["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != facts["bytes"]:
                return f"{name} has {size} of {facts['bytes']} bytes"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Like `find_missing_file`, and compares the hash of every file."""
    if missing := find_missing_file(checkpoint):
        return missing
    files = _read_manifest(checkpoint)["files"]
    found = _sizes_and_hashes({name: checkpoint / name for name in files})
    changed = [name for name, facts in files.items() if found[name]["sha256"] != facts["sha256"]]
    return f"{changed[0]} is damaged: its SHA-256 is not the manifest's" if changed else None


def checkpoint_step(checkpoint: Path) -> int:
    return _read_manifest(checkpoint)["step"]


def checkpoint_fingerprint(checkpoint: Path) -> str | None:
    """The fingerprint of the run that wrote it; None if the manifest does not say."""
    try:
        return _read_manifest(checkpoint)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def remove_later_checkpoints(folder: Path, step: int, fingerprint: str) -> None:
    """Removes this run's checkpoints after `step`, which the run writes again: leftovers would mix two starts.

    What a killed process left half written or half removed goes too. Other runs' checkpoints stay.
    """
    for checkpoint in later_checkpoints(folder, step, fingerprint):
        remove_checkpoint(checkpoint)
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def later_checkpoints(folder: Path, step: int, fingerprint: str) -> list[Path]:
    """The checkpoints after `step` of the run with this fingerprint."""
    return [
        path
        for path in _list_checkpoints(folder)
        if checkpoint_fingerprint(path) == fingerprint and checkpoint_step(path) > step
    ]


def foreign_checkpoints(folder: Path, fingerprint: str, own_folder: bool) -> list[Path]:
    """The checkpoints in `folder` of other runs or programs.

    Without a readable manifest, one counts as this run's, damaged, if the folder is its `own_folder`.
    """
    found = {path: checkpoint_fingerprint(path) for path in _list_checkpoints(folder)}
    return [path for path, other in found.items() if other != fingerprint and not (own_folder and other is None)]


def find_checkpoint(asked: str | None, folder: Path, fingerprint: str) -> tuple[Path | None, list[str]]:
    """(the checkpoint to resume from or None to start at step 0, a line for each one that was passed over).

    `asked` is a path, the name of a checkpoint in `folder`, or 'latest' (the same as None): the newest undamaged one
    in `folder` of the run with this fingerprint. Raises UserError if a named one does not exist or is damaged.
    """
    if asked is None or asked == "latest":
        return _find_latest(folder, fingerprint)
    for checkpoint in (folder / asked, Path(asked)):
        if checkpoint.is_dir():
            if damage := find_damage(checkpoint):
                raise UserError(f"--resume_from_checkpoint {asked}: {checkpoint} cannot be used: {damage}")
            return checkpoint, []
    names = ", ".join(path.name for path in complete_checkpoints(folder)) or "none"
    raise UserError(f"--resume_from_checkpoint {asked}: no such folder; complete checkpoints in {folder}: {names}")


def _find_latest(folder: Path, fingerprint: str) -> tuple[Path | None, list[str]]:
    partial = sorted(path for path in folder.glob(f"{PARTIAL}*") if path.name.removeprefix(PARTIAL).isdigit())
    notes = [f"{path.name} was being written when the run ended: not used" for path in partial]
    for checkpoint in reversed(_list_checkpoints(folder)):
        damage = find_damage(checkpoint)
        if not damage and checkpoint_fingerprint(checkpoint) == fingerprint:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} {f'cannot be used ({damage})' if damage else 'is of another run: not used'}")
    return None, notes


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the optimizer and the scaler (None without one). `weights_only`: the file cannot run code."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
