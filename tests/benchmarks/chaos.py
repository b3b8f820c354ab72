"""Starts job.sh again and again, ends it at random moments in random ways.

    python tests/benchmarks/chaos.py                       200 starts: an hour or two, tiny model
    python tests/benchmarks/chaos.py --starts 20 --seed 1
    python tests/benchmarks/chaos.py --minutes 30          no start after that, the last job is finished

It says how far it is after each start, each fault when it is found, and the verdict also when it is interrupted
(Ctrl-C, SIGTERM).

Each start gets SIGKILL, SIGTERM, SIGINT or SIGHUP, the whole process group at once, until a job has finished; then the
next job begins with folders of its own. All must end with the captions, weights, optimizer, loss rows and pictures of
the job that was left alone, bit for bit. No step may be done again that a checkpoint should have kept, and nothing
printed may be a traceback. What breaks this is listed, and the exit code is 1.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests")]

from background import count_rows  # noqa: E402
from captioned_folder import write_captioned_folder  # noqa: E402
from fake_job import environment  # noqa: E402
from run_folder import assert_same_bits  # noqa: E402
from tiny_model import make_tiny_model  # noqa: E402

ENDINGS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 1800  # seconds, for a job that was told to end, or left alone
EVERY = 5  # steps between checkpoints
LEFTOVERS = (".*.part", ".partial-*", ".lock*", ".reserve", "unet-*")
# What a job may end with, beside the signal itself: the script that ran may have noticed it first.
CODES = {
    signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 75, 143}, signal.SIGINT: {-2, 75, 130}, signal.SIGHUP: {-1, 75, 129},
}  # fmt: skip


@dataclass
class Chaos:
    """All jobs, and what was found wrong with them."""

    work: Path
    steps: int
    faults: list[str] = field(default_factory=list)
    saved: int | None = None  # the step that the last start said it had saved, when it was asked to stop
    ends: Counter = field(default_factory=Counter)
    alone: float = 0  # seconds of the job that was left alone
    jobs: int = 0  # finished and compared with it
    running: subprocess.Popen | None = None

    def start(self, name: str) -> subprocess.Popen:
        """A job whose data set, model and pictures are in folders of its `name`, in a process group of its own."""
        folder = self.work / name
        if not folder.is_dir():
            write_captioned_folder(folder / "data")
            make_last_caption_missing(folder / "data" / "metadata.jsonl")
            (folder / "tmp").mkdir()
        flags = (
            f"--max_train_steps {self.steps} --checkpointing_steps {EVERY} --checkpoints_total_limit 1 --use_ema "
            "--train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3 --random_flip --seed 0 "
            "--prior_images 2 --validation_steps 10 --validation_prompts jeans"
        )
        choices = {
            "MODEL": self.work / "tiny", "CAPTIONER": "", "DATASET": folder / "data", "OUTPUT_DIR": folder / "out",
            "NUM_IMAGES": 2, "PROMPT": "denim jeans", "VENV": sys.prefix, "TRAIN_ARGS": flags,
            "INFERENCE_ARGS": f"--steps 2 --output_dir '{folder}/pictures'", "TMPDIR": folder / "tmp",
            "HF_HUB_OFFLINE": 1, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", ROOT / "job.sh"], env=environment(**choices), cwd=folder, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def run_all(self, starts: int, minutes: float, rng: random.Random) -> None:
        """One job left alone, then jobs that are ended again and again, each compared with the first."""
        make_tiny_model(self.work / "tiny")
        begun = time.perf_counter()
        assert self.run_once("alone", None), self.faults
        self.alone = time.perf_counter() - begun

        def goes_on() -> bool:
            return self.ends.total() <= starts and time.perf_counter() < begun + 60 * minutes

        while goes_on():
            name, finished, self.saved = f"job {self.jobs + 1}", False, None
            while not finished:
                moment = rng.uniform(0, self.alone) if goes_on() else None
                finished = self.run_once(name, moment, rng.choice(ENDINGS))
                print(f"{self.verdict()} ({name})", flush=True)
            self.jobs += 1
            self.compare(name)

    def end(self) -> None:
        """Kills the job that runs."""
        if self.running and self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()

    def verdict(self) -> str:
        """The figures so far; the job that was left alone at first is not counted."""
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        return (
            f"{self.ends.total() - 1} starts, {self.jobs} jobs finished and compared ({ends}; alone "
            f"{self.alone:.0f} s): {len(self.faults) or 'no'} faults"
        )

    def note(self, fault: str) -> None:
        self.faults.append(fault)
        print(f"FAULT {fault}", flush=True)

    def run_once(self, name: str, moment: float | None, ending: signal.Signals = signal.SIGKILL) -> bool:
        """One start, ended after `moment` seconds (None: left alone); whether the job has finished."""
        out = self.work / name / "out"
        job = self.running = self.start(name)
        rows = count_rows(out)
        ended = False
        try:
            printed, _ = job.communicate(timeout=moment or PATIENCE)
        except subprocess.TimeoutExpired:
            if moment is None:
                os.killpg(job.pid, signal.SIGKILL)
                sys.exit(f"{name}: left alone, it has not ended after {PATIENCE} s")
            ended = True
            os.killpg(job.pid, ending)
            printed, _ = job.communicate(timeout=PATIENCE)  # until the last process of the group has ended
        self.check(f"{name}, start {self.ends.total()}", job.returncode, printed, ending if ended else None, rows)
        self.ends[ending.name if ended else "left alone"] += 1
        return job.returncode == 0

    def check(self, where: str, code: int, printed: str, ending: signal.Signals | None, rows: int) -> None:
        """Notes what is wrong with one start; `rows` is how many steps metrics.jsonl had before it."""
        wrong = []
        if "Traceback" in printed:
            wrong.append("a traceback")
        if code and code not in (CODES[ending] if ending else ()):
            wrong.append(f"exit code {code}")
        if "\nsteps " in printed:
            first = number_after("going on after step", printed) or 0
            if rows - first > EVERY or self.saved not in (None, first):
                wrong.append(f"{rows} steps were done, {self.saved} saved, and it went on after step {first}")
            self.saved = number_after("saved in checkpoint-", printed)
        if wrong:
            self.note(f"{where} ({ending.name if ending else 'left alone'}): {', '.join(wrong)}\n{printed}")

    def compare(self, name: str) -> None:
        """Notes where a finished job differs from the one that was left alone."""
        one, other = self.work / "alone", self.work / name
        try:
            assert_same_bits(one / "out", other / "out", self.steps)
            assert contents(one / "data") == contents(other / "data"), "the captions differ"
            assert pixels(one / "pictures") == pixels(other / "pictures"), "the pictures differ"
            left = [str(path) for pattern in LEFTOVERS for path in other.rglob(pattern)]
            assert not left, f"left over: {left}"
        except (AssertionError, OSError) as error:
            self.note(f"{name}: not as the job that was left alone: {error!r}")


def number_after(words: str, printed: str) -> int | None:
    found = re.search(rf"{words} ?(\d+)", printed)
    return int(found[1]) if found else None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def pixels(folder: Path) -> dict[str, bytes]:
    """By the seed at the end of a picture's name: the rest of it, and the text inside, tell of the model's folder."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            found[path.stem.rpartition("-")[2]] = image.tobytes()
    return found


def make_last_caption_missing(metadata: Path) -> None:
    """So that the job has something to caption."""
    rows = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(rows[:-1]))
    assert json.loads(rows[-1])["file_name"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help=f"of a job, a multiple of {EVERY}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no start is ended after that")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nohup and `&` ignore some, and the jobs would too
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        chaos = Chaos(Path(name), args.steps)
        try:
            chaos.run_all(args.starts, args.minutes, random.Random(args.seed))
        except KeyboardInterrupt:
            chaos.end()
            print("interrupted; so far:")
        print(*chaos.faults, chaos.verdict(), sep="\n\n")
    return int(bool(chaos.faults))


if __name__ == "__main__":
    sys.exit(main())
