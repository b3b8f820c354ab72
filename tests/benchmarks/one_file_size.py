"""Stable Diffusion's size there and back: folder → file → folder → file; prints seconds and peak memory of each.

python tests/benchmarks/one_file_size.py
python tests/benchmarks/one_file_size.py --version 2 --dtype fp32
python tests/benchmarks/one_file_size.py --version XL

Random weights. Takes a few minutes, 6 GB of memory (11 GB for fp32 or XL) and three times the file on disk (TMPDIR).
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests")]


def main(version: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, first, second = (Path(name) / file for file in ("model", "first.safetensors", "second.safetensors"))
        print("making the model ...", flush=True)
        run("make", folder, version, dtype)
        for tokenizer in folder.glob("tokenizer*"):
            make_vocabulary(tokenizer)
        run("export", folder, first, dtype)
        converted = run("convert", first, folder, Path(name) / "converted")
        run("convert", first, folder, Path(name) / "converted")  # again: what was made of it is found
        shutil.rmtree(folder)  # makes room
        run("export", Path(converted), second, dtype)
        print(run("compare", first, second))


def run(what: str, *words: object) -> str:
    """One step in a process of its own, so that its memory is its own; the last line that it prints is the result."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", what, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    )
    print(*done.stdout.splitlines()[-2:-1], sep="\n", flush=True)
    return done.stdout.splitlines()[-1]


def step(what: str, *words: str) -> None:
    """Does one step, and prints its cost and its result."""
    started = time.perf_counter()
    result = {"make": make, "export": export, "convert": convert, "compare": compare}[what](*words)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.perf_counter() - started:.0f} s, {memory:.1f} GB at most\n{result}")


def make(folder: str, version: str, dtype: str) -> str:
    import full_size
    import torch

    if version == "XL":
        make_xl(Path(folder), getattr(torch, {"fp16": "float16", "fp32": "float32"}[dtype]))
        return folder
    full_size.make_model(Path(folder))
    if version == "2":
        make_sd2_parts(Path(folder))
    if dtype == "fp32":
        from diffusers import StableDiffusionPipeline

        torch.set_default_dtype(torch.float32)
        StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_sd2_parts(folder: Path) -> None:
    """Puts UNet, text encoder and prediction type of Stable Diffusion 2.1 in place of those of 1.5."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tiny_model import sd_scheduler
    from unet_configs import SD21

    text = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
    for part, model in (("text_encoder", CLIPTextModel(text)), ("unet", UNet2DConditionModel(**SD21))):
        model.save_pretrained(folder / part)
    sd_scheduler("v_prediction").save_pretrained(folder / "scheduler")


def make_xl(folder: Path, dtype) -> None:
    """SDXL's parts, of 2.57, 0.82 and 0.08 B parameters."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    from one_file_models import full_size_xl_parts
    from runtime.paths import STARTER
    from tiny_xl import xl_scheduler

    parts = full_size_xl_parts()
    for part in parts.values():
        part.to(dtype).to_empty(device="cpu")
        for parameter in part.parameters():
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
    tokenizers = {name: CLIPTokenizer.from_pretrained(STARTER / "tokenizer") for name in ("tokenizer", "tokenizer_2")}
    pipeline = StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=xl_scheduler("v_prediction"))
    pipeline.save_pretrained(folder)


def make_vocabulary(tokenizer: Path) -> None:
    """Fills the starter's vocabulary up to CLIP's number of tokens."""
    from runtime.paths import STARTER

    (tokenizer / "tokenizer.json").unlink(missing_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (tokenizer / name).write_bytes((STARTER / "tokenizer" / name).read_bytes())
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    more = {f"[{index}]": index for index in range(len(vocabulary), 49408)}
    (tokenizer / "vocab.json").write_text(json.dumps({**vocabulary, **more}))


def export(folder: str, to: str, dtype: str) -> str:
    from export_checkpoint import parse_args
    from exporting.export import export_checkpoint

    export_checkpoint(parse_args(["--model", folder, "--to", to, "--dtype", dtype, "--no_verify"]))
    return to


def convert(file: str, tokenizer: str, to: str) -> str:
    from bases.one_file import convert_one_file

    return str(convert_one_file(Path(file), file, Path(to), Path(tokenizer), False, None))


def compare(first: str, second: str) -> str:
    import torch
    from safetensors import safe_open

    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        names = list(one.keys())
        same = names == list(other.keys()) and all(
            one.get_tensor(name).dtype == other.get_tensor(name).dtype
            and torch.equal(one.get_tensor(name), other.get_tensor(name))
            for name in names
        )
    return f"{len(names)} weights: {'all bits are equal' if same else 'NOT EQUAL'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=("1", "2", "XL"), default="1", help="of Stable Diffusion (default: 1)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of the weights (default: fp16)")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    step(*args.step) if args.step else main(args.version, args.dtype)
