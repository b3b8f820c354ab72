"""Mutates one-file checkpoints and the .yaml beside them, and puts each through the conversion to a folder.

    python tests/benchmarks/fuzz_one_file.py

Every one must end with exit code 0 and a model that loads, or with 2 and a line that names the file: no traceback, no
hang, and nothing half written. Files are .safetensors and, every fifth, a pickle.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "text_to_image"), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]

import torch  # noqa: E402
from fuzz_data_set import LONGEST, mutate, too_long  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from bases.one_file import convert_one_file  # noqa: E402
from models.loading import TEXT_ENCODERS, load_text_encoder, load_unet, load_vae, quiet_libraries  # noqa: E402
from one_file_models import as_ema, ldm_weights, make_model  # noqa: E402
from runtime.errors import exit_with  # noqa: E402
from tiny_xl import make_xl_model  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)
PREDICTION = "modelspec.prediction_type"
METADATA = ({}, {PREDICTION: "v"}, {PREDICTION: "?"}, {"modelspec.architecture": "-"})
YAML = b"model: {params: {parameterization: v, image_size: 64, linear_end: 0.012, scale_factor: 0.2, timesteps: 9}}\n"
NOTED = ("embedding", ".proj_in", "label_emb", "text_projection")  # in names of weights by which a model is known
ADDED = ("v_pred", "ztsnr", "lora", "betas", "conditioner.x", "joint_blocks.0", "edm_mean", "denoiser.sigmas")


def reshape(weight: torch.Tensor, way: int) -> torch.Tensor:
    """As a vector, a number, with another first dimension, or one more."""
    flat = weight.reshape(-1)
    return (flat[:0], flat, flat.sum(), flat[:1], weight[None], flat[: len(flat) // 2 * 2].reshape(2, -1))[way]


def change_weights(weights: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """One to four weights dropped, renamed, of another shape or dtype, or keys added; at times the UNet is an EMA."""
    weights = dict(as_ema(weights), **weights) if rng.random() < 0.1 else dict(weights)
    for _ in range(rng.randint(1, 4)):
        name = rng.choice([*weights, *(name for name in weights if any(part in name for part in NOTED))])
        weight, way = weights[name], rng.randrange(6)
        if way == 0:
            del weights[name]
        elif way == 1:
            new = rng.choice([name + "x", name.partition(".")[2] or "a", name.replace("0", "1"), ""])
            weights[new] = weights.pop(name)
        elif way == 2:
            weights[name] = reshape(weight, rng.randrange(6))
        elif way == 3:
            weights[name] = weight.to(rng.choice(DTYPES))
        elif way == 4:
            weights[rng.choice(ADDED)] = torch.zeros(0)
        else:
            weights = {key: w for key, w in weights.items() if not key.startswith(name.rpartition(".")[0])}
            weights["left"] = torch.zeros(1)
    return {name: weight.clone().contiguous() for name, weight in weights.items()}


def write(path: Path, weights: dict[str, torch.Tensor], rng: random.Random) -> None:
    """The weights changed, the header damaged or the file cut short; and at times a .yaml."""
    way = rng.randrange(4)
    weights = change_weights(weights, rng) if way < 2 else weights
    if path.suffix == ".ckpt":
        odd = {3: torch.zeros(1), "epoch": 1, "list": [torch.zeros(1)]} if rng.random() < 0.5 else {}
        torch.save(rng.choice([weights | odd, {"state_dict": weights | odd}, {"state_dict": 3}, [weights]]), path)
    else:
        save_file(weights, path, {"format": "pt", **rng.choice(METADATA)})
    content = path.read_bytes()
    if way == 2:  # most of the file is weights, any of which may be any number
        path.write_bytes(mutate(content[:20000], rng) + content[20000:])
    elif way == 3:
        path.write_bytes(content[: rng.randrange(len(content))])
    if rng.random() < 0.3:
        path.with_suffix(".yaml").write_bytes(mutate(YAML, rng) if rng.random() < 0.7 else YAML)


def check(path: Path, to: Path, tokenizer: Path) -> int | str:
    """The exit code, or the name of what went wrong."""

    def convert() -> None:
        folder = convert_one_file(path, f"--model {path}", to, tokenizer, True, None)
        for load in (load_unet, load_vae):
            load(folder)
        for part in filter(lambda part: (folder / part).is_dir(), TEXT_ENCODERS):
            load_text_encoder(folder, part=part)

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            exit_with(convert)
    except SystemExit as ended:
        named = said.getvalue().startswith("error: ") and path.stem in said.getvalue()
        return ended.code if ended.code == 0 or named else f"no message: {said.getvalue()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    raise AssertionError("exit_with always exits")


def fuzz(count: int, work: Path, rng: random.Random) -> Counter:
    models: dict[int | str, Path] = {version: make_model(work / f"sd{version}", version) for version in (1, 2)}
    models["XL"] = make_xl_model(work / "xl")
    weights, outcomes = [ldm_weights(folder, version) for version, folder in models.items()], Counter()
    for number in range(count):
        folder = work / "file"
        folder.mkdir()
        path = folder / f"m{number}{'.ckpt' if number % 5 == 0 else '.safetensors'}"
        write(path, rng.choice(weights), rng)
        outcome = check(path, folder / "converted", models[1])
        left = [found for found in folder.glob("converted/*") if outcome != 0 or found.suffix == ".part"]
        outcomes[f"left behind: {left}" if left else outcome] += 1
        if outcome not in (0, 2):
            print(f"{number}: {outcome}")
        shutil.rmtree(folder)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        outcomes = fuzz(args.files, Path(work), random.Random(args.seed))
    print(json.dumps({str(code): count for code, count in outcomes.most_common()}))
    print(f"{time.perf_counter() - begun:.0f} s")
    return int(bool(set(outcomes) - {0, 2}))


if __name__ == "__main__":
    sys.exit(main())
