"""Runs a training script up to a step and writes when each step was logged: timed_script.py TIMES LAST SCRIPT …

Both our script and diffusers' call `Accelerator.log` once a step, after they have read its loss, for which they wait
for the GPU. The run ends with step LAST, before anything is saved.
"""

import json
import runpy
import sys
import time
from pathlib import Path

from accelerate import Accelerator


def main() -> None:
    file, last, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    times: dict[int, float] = {}

    def note(self: Accelerator, values: dict, step: int | None = None, log_kwargs: dict | None = None) -> None:
        times[step or 0] = time.perf_counter()
        if step == last:
            file.write_text(json.dumps(times))
            raise SystemExit(0)

    Accelerator.log = note
    sys.argv = sys.argv[3:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
