"""The commands that a run names, ready to paste: the one that goes on with it, and those that use its result."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from models.defaults import FROM_FLAG
from runs.records import REPORT_FILE, is_lora, without_secrets
from runtime.paths import SCRIPTS, display_path


def flags_as_given(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments by flag, without what is secret: several data sets are all of --dataset."""
    values = without_secrets(vars(args))
    more = values.pop("more_datasets", None)
    return {**values, "dataset": [values["dataset"], *more]} if more else values


def resume_command(args: argparse.Namespace, processes: int) -> str:
    """The command that goes on with the run, as it was given, without what is secret."""
    values, words = flags_as_given(args), []
    for name, source in without_secrets(args.origins).items():
        if source != FROM_FLAG or name in ("overwrite", "dry_run"):
            continue
        value = values[name]
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [w for item in (value if isinstance(value, list) else [value]) for w in (f"--{name}", str(item))]
    launcher = f"accelerate launch --num_processes {processes}" if processes > 1 else "python"
    return f"{launcher} {_script('train_text_to_image.py')} {shlex.join(words)}"


def closing_lines(folder: Path, run: dict) -> list[tuple[str, str]]:
    """Where the model is and the commands that use it, ready to paste."""
    model, prompt = shlex.quote(display_path(folder)), shlex.quote(run["example_prompts"][0])
    page = folder / REPORT_FILE
    rows = [
        ("the model", display_path(folder)),
        *([("its page", f"{display_path(page)}, for a browser")] if page.is_file() else []),
        ("generate with it", f"python {_script('inference.py')} --model {model} --prompt {prompt}"),
    ]
    if is_lora(run):
        file = shlex.quote(f"{folder.name}.safetensors")
        command = f"python {_script('export_checkpoint.py')} --model {model} --to {file} --lora_only"
        rows.append(("other programs", command))
    return rows


def _script(name: str) -> str:
    return shlex.quote(display_path(SCRIPTS / name))
