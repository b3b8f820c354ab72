"""A training run's record, run.json: its fingerprint, and how a run's folder is named, read, written and removed.

Standard library only.
"""

import argparse
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from data.file_facts import FILE
from metadata.containers import title_of
from runtime.errors import UserError, WorkError
from runtime.files import write_text_atomically
from runtime.paths import OUTPUTS

RUN_FILE, REPORT_FILE = "run.json", "report.html"
# Arguments that do not change the weights, or that count in another way: data set and model by their content; batch
# size, accumulation and processes by their product. Every other argument counts, so a new flag is never forgotten.
NOT_IN_FINGERPRINT = {
    "allow_pickle", "cache", "cache_dir", "caption_column", "checkpointing_steps", "checkpoints_total_limit",
    "compile", "dataloader_num_workers", "dataset", "dataset_config_name", "distributed_timeout", "dry_run",
    "enable_xformers_memory_efficient_attention", "epochs", "foreach_ema", "gradient_accumulation_steps",
    "gradient_checkpointing", "hub_model_id", "hub_token", "image_column", "latents_cache_dir", "local_rank",
    "logging_dir", "max_bad_steps", "max_train_samples", "max_train_steps", "metadata_file", "more_datasets",
    "num_validation_images", "offload_ema", "origins", "output_dir", "overwrite", "pretrained_model_name_or_path",
    "push_to_hub", "report", "report_to", "resume_from_checkpoint", "revision", "samples", "seed", "timing",
    "tokenizer", "tracker_project_name", "train_batch_size", "validation_dir", "validation_epochs",
    "validation_pictures", "validation_prompts", "validation_split", "validation_steps", "variant",
}  # fmt: skip
FACTS_IN_FINGERPRINT = (  # of run.json, beside its arguments
    "mixed_precision", "prior_guidance_scale", "dataset_hash", "base_model_hash", "global_batch", "seed_asked",
)  # fmt: skip
OFF = (None, False, 0)
# Of the optimizers use_8bit_adam, which is older, tells these two apart.
OTHER_OFF = {"optimizer": ("adamw", "adamw8bit"), "timestep_bias_multiplier": (1,)}
ZERO_IS_A_VALUE = {"lr_warmup_steps", "seed_asked"}
HASH_CHANGES = {  # what it means that one of the hashes differs
    "dataset_hash": "the data set: other pictures, masks, repeats, captions or other forms of them",
    "base_model_hash": "the base model: other weights or configs",
}
KEPT_UNETS = "unet-*"  # the pattern of `kept_unet`
RESULT_FOLDERS = (
    "validation", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor",
)  # fmt: skip
RESULT_FILES = ("metrics.jsonl", "model_index.json", "pytorch_lora_weights.safetensors", REPORT_FILE, RUN_FILE)
SECRETS = {"hub_token"}  # never written to a file or tracker, never printed


def fingerprint_run(run: Mapping[str, Any]) -> str:
    """64 hex digits of everything in run.json that changes the weights, except the number of steps."""
    return hashlib.sha256(_json(sorted(_weight_settings(run).items())).encode()).hexdigest()


def _weight_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprint is of. Settings that are off are left out, so that a new flag does not change old runs."""
    settings = {name: value for name, value in run["arguments"].items() if name not in NOT_IN_FINGERPRINT}
    settings |= {name: run.get(name) for name in FACTS_IN_FINGERPRINT}
    settings = {name: value for name, value in settings.items() if value not in OTHER_OFF.get(name, ())}
    return {name: value for name, value in settings.items() if value not in OFF or name in ZERO_IS_A_VALUE}


def run_differences(earlier: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """A line for each setting that changes the weights and differs; empty if both are the same run."""
    try:
        before = _weight_settings(earlier)
    except (KeyError, AttributeError):
        return ["its run.json does not say with which arguments it was made"]
    now, lines = _weight_settings(run), []
    for name in sorted({*before, *now}):
        there, here = _json(before.get(name)), _json(now.get(name))
        if there != here:
            lines.append(HASH_CHANGES.get(name) or f"{name}: {there} there, {here} here")
    return lines


def _json(value: object) -> str:
    return json.dumps(value, default=str)


def without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in SECRETS}


def seed_for(seed: int | None, fingerprint: str) -> int:
    """`seed`, else one that follows from the fingerprint, so that every process and every restart has the same."""
    return int(fingerprint[-8:], 16) if seed is None else seed


def output_folder(asked: Path | None, dataset: str, base: PathLike[str], fingerprint: str) -> Path:
    """`asked`, else a folder in output/ of this run's own. UserError if the result would overwrite its base model."""
    if asked and asked.resolve() == Path(base).resolve():
        raise UserError(f"--output_dir {asked} is the model that is fine-tuned; name another folder for the result")
    return asked or OUTPUTS / f"{title_of(Path(dataset).expanduser())}-{fingerprint[:8]}"


def cache_folder(args: argparse.Namespace, folder: Path) -> Path:
    """Where the run in `folder` keeps what it encodes."""
    return args.latents_cache_dir or folder / "cache"


def find_file_facts(args: argparse.Namespace) -> list[Path]:
    """Where earlier starts of the run left what they knew of its files, the one written last at the end. Its folder
    is not known yet where --output_dir does not name it: it follows from the files."""
    if args.latents_cache_dir or args.output_dir:
        return [cache_folder(args, args.output_dir) / FILE]
    found = OUTPUTS.glob(f"{glob.escape(title_of(Path(args.dataset).expanduser()))}-*/cache/{FILE}")
    return sorted((path for path in found if path.exists()), key=os.path.getmtime)[-1:]


def read_run(folder: Path) -> dict[str, Any] | None:
    """The content of run.json; None if there is no such file. UserError if it cannot be read."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); move it away or name another --output_dir") from None
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes run.json atomically. WorkError if the folder cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / RUN_FILE, json.dumps(run, indent=2, default=str) + "\n")
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error.strerror})") from None


def kept_unet(step: int) -> str:
    """The folder of a UNet whose result could not be saved whole after `step`."""
    return f"unet-{step}"


def folders_of_run(run: Mapping[str, Any]) -> tuple[list[Path], Path | None]:
    """(the folders of its training pictures, its --metadata_file or None); UserError where run.json does not say."""
    arguments = run.get("arguments", {})
    folders = [part["folder"] for part in run.get("folders", ())] or [arguments.get("dataset")]
    file = arguments.get("metadata_file")
    if not all(folders):
        raise UserError(f"{RUN_FILE} does not say where they are")
    return [Path(folder) for folder in folders], Path(file) if file else None


def is_lora(run: Mapping[str, Any]) -> bool:
    """Whether the run trains a LoRA, and not the whole UNet."""
    return run.get("trained", "UNet") != "UNet"


def remove_run(folder: Path) -> None:
    """Removes a run's checkpoints and result; other files stay.

    run.json goes last: what an interrupted removal leaves is still known as a run.
    """
    for path in [*folder.glob("checkpoint-*"), *folder.glob(KEPT_UNETS), *(folder / name for name in RESULT_FOLDERS)]:
        shutil.rmtree(path, ignore_errors=True)
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)


def newest_finished_run(outputs: Path = OUTPUTS) -> Path | None:
    """The folder in `outputs` whose run finished last, by the time in its run.json; None if there is none."""
    runs = {path.parent: _read_run_if_possible(path.parent) for path in outputs.glob(f"*/{RUN_FILE}")}
    finished = {folder: run["finished_at"] for folder, run in runs.items() if run.get("finished")}
    return max(finished, key=lambda folder: finished[folder], default=None)


def newest_run(outputs: Path = OUTPUTS) -> Path | None:
    """The folder in `outputs` whose run.json was written last, finished or not; None if there is none."""
    records = [path for path in outputs.glob(f"*/{RUN_FILE}") if path.is_file()]
    return max(records, key=lambda path: path.stat().st_mtime).parent if records else None


def _read_run_if_possible(folder: Path) -> dict[str, Any]:
    try:
        return read_run(folder) or {}
    except UserError:
        return {}
