"""Damages a tiny model folder in many ways, and trains a step and generates a picture with each.

    python tests/benchmarks/fuzz_model_folder.py

Both must accept it (exit code 0), or both refuse it (2) with one message that names the part or the file: no
traceback, no hang.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "text_to_image")]

import torch  # noqa: E402
from fuzz_data_set import Hang, mutate, too_long  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from captioned_folder import write_captioned_folder  # noqa: E402
from generation.generate import generate  # noqa: E402
from inference import parse_args as inference_args  # noqa: E402
from runtime.errors import exit_with  # noqa: E402
from tiny_model import add_safety_checker, make_tiny_model  # noqa: E402
from train_text_to_image import parse_args as training_args  # noqa: E402
from training.train import train  # noqa: E402

LONGEST = 120  # seconds that a step or a picture may take
MODELS = ("unet", "vae", "text_encoder", "safety_checker")
PARTS = (*MODELS, "tokenizer", "scheduler", "feature_extractor")
VALUES: list[Any] = [None, "text", -1, 0, 1, 3, 0.5, True, [], [1, 2], {}, {"a": 1}]
NOT_JSON = ("", "{", "[]", "null", "3", '"text"', "\x00" * 64)
CLASSES: list[Any] = [
    None, "text", [None, None], [], ["diffusers", "NoSuchClass"], ["diffusers", "UNet2DModel"],
    ["diffusers", "DDIMScheduler"],
    ["transformers", "BertModel"], ["diffusers", "FlowMatchEulerDiscreteScheduler"], ["evil", "Evil"], [3, 4],
]  # fmt: skip


# --- kinds of damage: each changes the folder and says what it did --------------------------------------------------


def change_weight(folder: Path, rng: random.Random) -> str:
    """A weight is removed, added, cut, stored as numbers of another kind, or named otherwise."""
    file = rng.choice([file for part in MODELS for file in (folder / part).glob("*.safetensors")])
    weights = load_file(file)
    name = rng.choice(sorted(weights))
    weight = weights.pop(name)
    changes: dict[str, dict[str, torch.Tensor]] = {
        "removed": {},
        "with another": {name: weight, f"{name}.more": weight.clone()},
        "longer": {name: torch.cat([weight, weight])},
        "transposed": {name: weight.flatten()[None].contiguous()},
        "as int32": {name: weight.int()},
        "as fp64": {name: weight.double()},
        "renamed": {name.replace("weight", "bias", 1) + ".x": weight},
    }
    change = rng.choice(sorted(changes))
    save_file(weights | changes[change], file, {"format": "pt"})
    return f"{file.relative_to(folder)}: {name} {change}"


def damage_file(folder: Path, rng: random.Random) -> str:
    """A safetensors file is cut short or empty, or has other bytes in its header."""
    file = rng.choice([file for part in MODELS for file in (folder / part).glob("*.safetensors")])
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    way = rng.choice(["cut", "empty", "flipped", "flipped", "longer"])
    if way == "cut":
        content = content[: rng.randrange(len(content))]
    elif way == "empty":
        content = bytearray()
    elif way == "flipped":
        content[rng.randrange(8 + header)] ^= 1 << rng.randrange(8)
    else:
        content += b"more"
    file.write_bytes(content)
    return f"{file.relative_to(folder)}: {way}"


def change_config(folder: Path, rng: random.Random) -> str:
    """A key of a config is removed, or has another value or type."""
    file = rng.choice(_configs(folder))
    config = json.loads(file.read_text())
    key = rng.choice(sorted(config))
    old, near = config.pop(key), rng.random() < 0.4
    if rng.random() < 0.8:
        config[key] = _near(old, rng) if near else rng.choice(VALUES)
    file.write_text(json.dumps(config))
    return f"{file.relative_to(folder)}: {key} {old!r} -> {config.get(key, 'removed')!r}"


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, 2 * value, -value, value / 2])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper()])
    if isinstance(value, list):
        return rng.choice([value[::-1], value[:-1], value * 2])
    return {}


def replace_json(folder: Path, rng: random.Random) -> str:
    """A config is not JSON, or no object."""
    file = rng.choice([*_configs(folder), folder / "model_index.json"])
    content = rng.choice(NOT_JSON)
    file.write_text(content)
    return f"{file.relative_to(folder)}: is {content!r}"


def _configs(folder: Path) -> list[Path]:
    found = [file for part in PARTS for file in (folder / part).glob("*config.json")]
    return sorted(file for file in found if file.parent.name != "tokenizer" or file.name == "tokenizer_config.json")


def remove_part(folder: Path, rng: random.Random) -> str:
    part = rng.choice(PARTS)
    shutil.rmtree(folder / part)
    return f"{part}/ removed"


def rename_file(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(file for part in PARTS for file in (folder / part).iterdir()))
    name = rng.choice([f"my_{file.name}", f"{file.name}.old", f"{file.stem}.fp16{file.suffix}", None])
    if name:
        file.rename(file.with_name(name))
    else:
        file.unlink()
    return f"{file.relative_to(folder)} -> {name}"


def damage_tokenizer(folder: Path, rng: random.Random) -> str:
    """The bytes of a file of the tokenizer are changed, or a token is removed, doubled or renumbered."""
    way = rng.choice(["bytes", "bytes", "removed", "renumbered", "alone"])
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    if way == "bytes":
        file = rng.choice(sorted((folder / "tokenizer").iterdir()))
        file.write_bytes(mutate(file.read_bytes(), rng))
        return f"tokenizer/{file.name}: bytes"
    for file in (folder / "tokenizer").glob("*.json"):
        if file.name == "tokenizer.json":
            file.unlink()  # which would be read in place of the others
    token = rng.choice(sorted(vocabulary))
    if way == "removed":
        del vocabulary[token]
    elif way == "renumbered":
        vocabulary[token] = rng.choice([-1, 0, 3, 10**6, "3", None, 0.5])
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    return f"tokenizer/vocab.json: {token} {way}"


def change_index(folder: Path, rng: random.Random) -> str:
    """model_index.json names another class for a part, none, or something else."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    part = rng.choice([*PARTS, "_class_name", "requires_safety_checker", "image_encoder"])
    old = index.pop(part, None)
    if rng.random() < 0.9:
        index[part] = rng.choice(CLASSES)
    file.write_text(json.dumps(index))
    return f"model_index.json: {part} {old!r} -> {index.get(part, 'removed')!r}"


KINDS: tuple[tuple[Callable[[Path, random.Random], str], int], ...] = (
    (change_config, 6), (change_weight, 3), (damage_file, 3), (change_index, 3), (damage_tokenizer, 2),
    (rename_file, 2), (replace_json, 2), (remove_part, 1),
)  # fmt: skip


# --- what becomes of it --------------------------------------------------------------------------------------------


def outcome(work: Callable[[], None]) -> tuple[int | str, str]:
    """(the exit code, or the name of what went wrong; what was said)."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            exit_with(work)
    except SystemExit as ended:
        return int(str(ended.code)), said.getvalue().strip().splitlines()[-1] if ended.code else ""
    except Hang as error:
        return "hang", str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:150], traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)


def try_model(model: Path, dataset: Path, work: Path) -> tuple[int | str, str]:
    """What training and generating made of it: 0 or 2 where they agree and the message is in order."""
    to = work / "out"
    shutil.rmtree(to, ignore_errors=True)
    words = ["--pretrained_model_name_or_path", model, "--dataset", dataset, "--output_dir", to / "run", "--seed", 0,
             "--max_train_steps", 1, "--train_batch_size", 1, "--resolution", 64]  # fmt: skip
    trained, said = outcome(lambda: train(training_args([str(word) for word in words])))
    words = ["--model", model, "--prompt", "a red t-shirt", "--num_images", 1, "--steps", 2, "--output_dir", to / "p",
             "--height", 64, "--width", 64]  # fmt: skip
    generated, said_too = outcome(lambda: generate(inference_args([str(word) for word in words])))
    if trained != generated:
        return f"training {trained}, generating {generated}", said or said_too
    if trained == 2 and not any(name in said for name in (*PARTS, "model_index.json")):
        return "no name in the message", said
    return trained, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="damaged folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--messages", action="store_true", help="print what was done to each folder, and what was said"
    )
    args = parser.parse_args()
    rng, begun, outcomes = random.Random(args.seed), time.perf_counter(), Counter()
    kinds, often = zip(*KINDS, strict=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        good = make_tiny_model(work / "good")
        add_safety_checker(good)
        dataset = write_captioned_folder(work / "data")
        for _ in range(args.count):
            model = work / "model"
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(good, model)
            done = rng.choices(kinds, often)[0](model, rng)
            found, said = try_model(model, dataset, work)
            outcomes[found] += 1
            if args.messages or found not in (0, 2):
                print(f"{found}\t{done}\n\t{said.replace(str(model), 'MODEL')}", flush=True)
    print(f"{args.count} folders: " + ", ".join(f"{n} x {code}" for code, n in outcomes.most_common()))
    print(f"{time.perf_counter() - begun:.0f} s")
    return bool(set(outcomes) - {0, 2})


if __name__ == "__main__":
    sys.exit(main())
