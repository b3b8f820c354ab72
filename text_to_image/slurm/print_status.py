"""Prints the status file of a training run for bash: state, step, steps, num_processes and model, a NUL after each.

python print_status.py FILE

Prints nothing where the run has written nothing.
"""

import json
import sys
from pathlib import Path

KEYS = ("state", "step", "steps", "num_processes", "model")


def fields(path: Path) -> list[str]:
    """The values in the order of KEYS; none where the file is empty or missing."""
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    status = json.loads(text) if text else {}
    return [str(status[key]) for key in KEYS if status]


if __name__ == "__main__":
    text = "".join(f"{value}\0" for value in fields(Path(sys.argv[1])))
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))  # a path as the file system has it
