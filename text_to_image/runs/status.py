"""Tells the program that started a training run how far it came, in a small JSON file in place of words in a log."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import WriteError, first_line
from runtime.files import write_text_atomically
from runtime.paths import display_path

if TYPE_CHECKING:
    from accelerate import Accelerator

STATUS_VARIABLE = "TEXT_TO_IMAGE_STATUS"  # of the environment: the file's path; unset: nothing is written


def write_status(accelerator: Accelerator, state: str, folder: Path, step: int, steps: int) -> None:
    """Writes the file from the main process, whole: how many of the `steps` are done, and what `folder` holds.

    `state` is 'finished' (`folder` is a model), 'stopped' (it has a checkpoint of `step`) or 'dry_run' (it is as it
    was). `folder` is written as one would type it in the current directory. A file that cannot be written is a
    warning.
    """
    path = os.environ.get(STATUS_VARIABLE)
    if not path or not accelerator.is_main_process:
        return
    status = {
        "model": display_path(folder), "num_processes": accelerator.num_processes, "step": step, "steps": steps,
        "state": state,
    }  # fmt: skip
    try:
        _write(Path(path), json.dumps(status) + "\n")
    except (OSError, WriteError) as error:  # the run itself is not worse for it
        print(f"warning: {STATUS_VARIABLE}={path}: cannot be written ({first_line(error)})", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    """Over the blanks that the file was made with, where they are enough: its disk may be full by now."""
    room = path.stat().st_size if path.is_file() else 0
    if room < len(text.encode()):
        return write_text_atomically(path, text)
    with open(path, "r+b") as file:
        file.write(text.encode().ljust(room))
