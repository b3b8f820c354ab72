"""A training run's folder: its name, run.json, and what is found in one that exists already. Standard library only."""

import hashlib
import json
import shutil
from os import PathLike
from pathlib import Path

from runtime.errors import UserError, WorkError
from runtime.files import write_text_atomically
from runtime.paths import OUTPUTS

RUN_FILE = "run.json"
# What may change without changing the weights. All other arguments count, so a new flag is never forgotten; data set
# and model count by their content, batch, accumulation and processes by their product.
NOT_IN_FINGERPRINT = {
    "allow_pickle", "cache", "cache_dir", "caption_column", "checkpointing_steps", "checkpoints_total_limit",
    "dataloader_num_workers", "dataset", "dataset_config_name", "distributed_timeout", "dry_run",
    "enable_xformers_memory_efficient_attention", "epochs", "foreach_ema", "gradient_accumulation_steps",
    "gradient_checkpointing", "hub_model_id", "hub_token", "image_column", "latents_cache_dir", "local_rank",
    "logging_dir", "max_bad_steps", "max_train_samples", "max_train_steps", "num_validation_images", "offload_ema",
    "origins", "output_dir", "overwrite", "pretrained_model_name_or_path", "push_to_hub", "report_to",
    "resume_from_checkpoint", "revision", "seed", "tracker_project_name", "train_batch_size", "validation_dir",
    "validation_epochs", "validation_prompts", "validation_split", "validation_steps", "variant",
}  # fmt: skip
ZERO_IS_NOT_OFF = {"lr_warmup_steps", "seed_asked"}
NAMED = {  # of what is no argument, in words
    "dataset_hash": "the data set: other pictures, captions or shorter forms of them",
    "base_model_hash": "the base model: other weights or configs",
}
RESULT_FOLDERS = (
    "validation", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor",
)  # fmt: skip
RESULT_FILES = ("metrics.jsonl", "model_index.json", "pytorch_lora_weights.safetensors", RUN_FILE)
SECRETS = {"hub_token"}  # in no file, tracker or line that is printed


def identity_of(run: dict) -> dict:
    """All of run.json that changes the weights, but not how long the run is."""
    counted = {name: value for name, value in run["arguments"].items() if name not in NOT_IN_FINGERPRINT}
    facts = (
        "mixed_precision",
        "prior_guidance_scale",
        "dataset_hash",
        "base_model_hash",
        "global_batch",
        "seed_asked",
    )
    return {**counted, **{name: run.get(name) for name in facts}}


def fingerprint_run(run: dict) -> str:
    """64 hex digits of everything that changes the weights.

    A flag that is off counts as one that there is not, so that a new one makes no other run of an old one.
    """
    return hashlib.sha256(_json(sorted(_told(identity_of(run)).items())).encode()).hexdigest()


def _told(identity: dict) -> dict:
    """Without what is off: None, False or 0."""
    off = (None, False, 0)
    return {name: value for name, value in identity.items() if value not in off or name in ZERO_IS_NOT_OFF}


def run_differences(earlier: dict, run: dict) -> list[str]:
    """What changes the weights and is not in both runs the same, a line each; empty for the same run."""
    try:
        before = _told(identity_of(earlier))
    except (KeyError, AttributeError):
        return ["its run.json does not say what it was"]
    now, lines = _told(identity_of(run)), []
    for name in sorted({*before, *now}):
        was, is_now = _json(before.get(name)), _json(now.get(name))
        if was != is_now:
            lines.append(NAMED.get(name) or f"{name}: {was} there, {is_now} here")
    return lines


def _json(value: object) -> str:
    return json.dumps(value, default=str)


def without_secrets(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name not in SECRETS}


def seed_for(seed: int | None, fingerprint: str) -> int:
    """`seed`, else one that follows from the run's fingerprint: every process and every restart has the same."""
    return int(fingerprint[-8:], 16) if seed is None else seed


def output_folder(asked: Path | None, dataset: str, base: PathLike[str], fingerprint: str) -> Path:
    """`asked`, else one in output/ that this run alone has; UserError where the result would replace its base."""
    if asked and asked.resolve() == Path(base).resolve():
        raise UserError(f"--output_dir {asked} is the model that is fine-tuned; name another folder for the result")
    return asked or OUTPUTS / f"{Path(dataset).resolve().name}-{fingerprint[:8]}"


def read_run(folder: Path) -> dict | None:
    """What run.json says, or None where there is none; UserError where it cannot be read."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); move it away or name another --output_dir") from None
    return run


def remove_run(folder: Path) -> None:
    """A run's checkpoints and result; other files stay. What tells that they are a run's goes last."""
    for path in [*folder.glob("checkpoint-*"), *(folder / name for name in RESULT_FOLDERS)]:
        shutil.rmtree(path, ignore_errors=True)
    for name in RESULT_FILES:
        (folder / name).unlink(missing_ok=True)


def write_run(folder: Path, run: dict) -> None:
    """run.json, replaced as a whole, so that a reader never sees half of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / RUN_FILE, json.dumps(run, indent=2, default=str) + "\n")
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error.strerror})") from None


def newest_finished_run(outputs: Path = OUTPUTS) -> Path | None:
    """The folder under `outputs` whose run finished last, by the time in its run.json; None where none has."""
    runs = {path.parent: _run_or_nothing(path.parent) for path in outputs.glob(f"*/{RUN_FILE}")}
    finished = {folder: run["finished_at"] for folder, run in runs.items() if run.get("finished")}
    return max(finished, key=finished.get, default=None)


def newest_run(outputs: Path = OUTPUTS) -> Path | None:
    """The folder under `outputs` whose run.json was written last, finished or not; None where there is none."""
    runs = [path for path in outputs.glob(f"*/{RUN_FILE}") if path.is_file()]
    return max(runs, key=lambda path: path.stat().st_mtime).parent if runs else None


def _run_or_nothing(folder: Path) -> dict:
    try:
        return read_run(folder) or {}
    except UserError:
        return {}
