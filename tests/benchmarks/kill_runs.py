"""Kills a run again and again at random moments and compares its end with that of one that was left alone.

    python tests/benchmarks/kill_runs.py                  12 kills of a run of 120 steps, tiny model
    python tests/benchmarks/kill_runs.py --processes 2

SIGKILL goes to the whole process group, as when a node dies. Weights, EMA, optimizer and the rows of metrics.jsonl
must be the same bit for bit. With --signal the run is asked to stop instead, and must end with 75.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny model is slower on many
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests")]

from background import Background, count_rows, finish, kill, start  # noqa: E402
from captioned_folder import write_captioned_folder  # noqa: E402
from run_folder import assert_same_bits  # noqa: E402
from tiny_model import make_tiny_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--signal", choices=("TERM", "INT", "USR1"), help="instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        flags = [
            "--pretrained_model_name_or_path", make_tiny_model(work / "tiny"),
            "--dataset", write_captioned_folder(work / "data"), "--resume_from_checkpoint", "latest",
            "--max_train_steps", args.steps, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2,
            "--learning_rate", 1e-3, "--use_ema", "--gradient_accumulation_steps", 2, "--train_batch_size", 2,
            "--random_flip", "--prior_images", 2, "--validation_split", 0.3, "--validation_prompts", "jeans",
        ]  # fmt: skip

        def begin(out: str) -> list[Background]:
            return start(work / "log", args.processes, *flags, "--output_dir", work / out)

        begun = time.perf_counter()
        run = begin("whole")
        run[0].until(lambda: count_rows(work / "whole"))
        first_step = time.perf_counter() - begun
        finish(run)
        alone, kills, starts = time.perf_counter() - begun, [], 0
        while True:  # now while it loads and encodes, now while it trains, so that about all are used up by its end
            latest = first_step + 2 * (alone - first_step) / args.kills
            run, moment = begin("cut"), rng.uniform(0.4 * first_step, latest)
            starts += 1
            if len(kills) < args.kills:
                run[0].for_at_most(moment)
            if len(kills) == args.kills or not run[0].running:
                finish(run)
                break
            if args.signal:
                run[0].send(signal.Signals[f"SIG{args.signal}"])
                assert run[0].ended() in (75, 0), (work / "log").read_text()
            else:
                assert kill(run)
            kills.append((round(moment, 1), count_rows(work / "cut")))
        assert_same_bits(work / "whole", work / "cut", args.steps)
    print("killed after (s, rows written so far): " + ", ".join(f"{s}, {rows}" for s, rows in kills))
    how = f"{len(kills)} times {args.signal or 'KILL'}, {starts} starts"
    print(f"{how}: the same bits as the run that was left alone ({alone:.1f} s)")


if __name__ == "__main__":
    main()
