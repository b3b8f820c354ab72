"""Checks and measures everything that needs a GPU: rows of numbers in OUT/gpu.md, the most telling first.

bash tests/gpu/run.sh OUT                       everything, in ten minutes at most
bash tests/gpu/run.sh OUT --only speed,memory   these groups alone
bash tests/gpu/run.sh OUT --diffusers_script diffusers/examples/text_to_image/train_text_to_image.py
bash tests/gpu/run.sh OUT --tiny                tiny models, on the CPU too: whether the script itself works

Each group runs in a process of its own. One that dies costs the row it was at; the rest is measured in a new one.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "text_to_image")]

from gpu.rows import FAILED, SKIPPED, UNUSABLE, Report, Row  # noqa: E402
from gpu.settings import Settings  # noqa: E402

GROUPS = {  # in this order; the module that measures each
    "first": "scripts",
    "speed": "speed",
    "correctness": "correctness",
    "memory": "memory",
    "diffusers": "side_by_side",
    "generation": "generating",
    "starter": "scripts",
    "xl": "xl",
}
GRACE_SECONDS = 2  # between the end of the time budget and the end of a process that is still at work


def main() -> int:
    args = parse_args()
    if args.measure:
        return measure_groups(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "gpu.md", "gpu.log"):
        (args.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the group's process ends too
    deadline = time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        groups = args.only or list(GROUPS)
        for together in [groups] if args.tiny else [[group] for group in groups]:  # tiny ones take less than a start
            start_groups(args, together, Path(work), deadline)
    rows = Report(args.out).rows
    failed = sum(row.status == FAILED for row in rows)
    print(f"{len(rows)} rows, {failed} of them failed: {args.out / 'gpu.md'}")
    return 1 if failed else 0


# --- The process that starts the others -----------------------------------------------------------------------------


def start_groups(args: argparse.Namespace, groups: list[str], work: Path, deadline: float) -> None:
    """Runs groups in a process; where that dies, in another one from the next row on."""
    while time.time() < deadline:
        known = len(Report(args.out).rows)
        code = run_process(args, groups, work, deadline)
        if code == 0:
            return
        report = Report(args.out)
        if row := report.running():
            late = " at the end of the time budget" if time.time() >= deadline else ""
            row.status, row.reason = FAILED, f"its process ended with exit code {code}{late}:\n{log_end(args.out)}"
            report.put(row)
            print(row, flush=True)
        elif len(report.rows) == known:  # it dies before it measures anything
            report.put(Row(groups[0], "start", FAILED, reason=f"exit code {code}:\n{log_end(args.out)}"))
            return
    report = Report(args.out)
    for group in set(groups) - {row.group for row in report.rows}:
        report.put(Row(group, "all", SKIPPED, reason="no time was left"))


def run_process(args: argparse.Namespace, groups: list[str], work: Path, deadline: float) -> int:
    """The exit code of the groups' process, which is ended, with all that it started, when the time is over."""
    words = [args.out, "--measure", ",".join(groups), "--work", work, "--deadline", deadline]
    words += ["--tiny"] if args.tiny else []
    words += ["--diffusers_script", args.diffusers_script] if args.diffusers_script else []
    process = subprocess.Popen([sys.executable, __file__, *map(str, words)], start_new_session=True)
    try:
        return process.wait(max(0.0, deadline - time.time()) + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_end(out: Path, lines: int = 12) -> str:
    log = out / "gpu.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""


# --- The process that measures --------------------------------------------------------------------------------------


def measure_groups(args: argparse.Namespace) -> int:
    """Measures the rows of the groups that are not in the report yet."""
    console = redirect_output(args.out / "gpu.log")
    from gpu.machine import describe_machine, gpu_answers

    report = Report(args.out)
    settings = Settings(args.out, args.work, args.tiny, args.deadline, args.diffusers_script)
    wanted = [("machine", row) for row in describe_machine(settings)]
    for group in args.measure:
        module = importlib.import_module(f"gpu.{GROUPS[group]}")
        wanted += [(group, row) for row in module.measurements(group, settings)]
    for group, measurement in wanted:
        if report.find(group, measurement.name) is None:
            row = report.measure(group, measurement, args.deadline)
            print(row, flush=True)  # into the log
            print(row, file=console, flush=True)
            if row.status == FAILED and not gpu_answers():
                return UNUSABLE
    return 0


def redirect_output(log: Path):
    """From here on all output of this process and its children goes into the log; returns the console."""
    console = os.fdopen(os.dup(1), "w")
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return console


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for gpu.json, gpu.md and gpu.log")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget; rows beyond it are skipped (9)")
    parser.add_argument("--only", type=group_names, metavar="GROUP,…", help=f"of {', '.join(GROUPS)} (all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, on a CPU too")
    parser.add_argument("--diffusers_script", type=Path, metavar="FILE", help="their train_text_to_image.py")
    for name, kind in (("--measure", group_names), ("--work", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # between the processes of this script
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.diffusers_script = args.diffusers_script and args.diffusers_script.resolve()
    return args


def group_names(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(wrong)}; the groups are {', '.join(GROUPS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
