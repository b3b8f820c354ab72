"""A training run's folder: its name, run.json, and what is found in one that exists already. Standard library only."""

import hashlib
import json
from pathlib import Path

from errors import UserError, WorkError
from files import replace_text

OUTPUTS = Path(__file__).resolve().parents[1] / "output"
RUN_FILE = "run.json"
# What may change without changing the weights. All other arguments count, so a new flag is never forgotten; data set
# and model count by their content, batch, accumulation and processes by their product.
NOT_IN_FINGERPRINT = {
    "cache", "cache_dir", "caption_column", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers",
    "dataset", "dataset_config_name", "dry_run", "epochs", "foreach_ema", "gradient_accumulation_steps",
    "gradient_checkpointing", "hub_model_id", "hub_token", "image_column", "latents_cache_dir", "local_rank",
    "logging_dir", "max_train_samples", "max_train_steps", "num_validation_images", "offload_ema", "origins",
    "output_dir", "pretrained_model_name_or_path", "push_to_hub", "report_to", "resume_from_checkpoint", "revision",
    "seed", "tracker_project_name", "train_batch_size", "validation_dir", "validation_epochs", "validation_prompts",
    "validation_split", "validation_steps", "variant",
}  # fmt: skip
SECRETS = {"hub_token"}  # in no file, tracker or line that is printed


def fingerprint_run(arguments: dict, dataset_hash: str, model_hash: str, global_batch: int, seed: int | None) -> str:
    """64 hex digits of everything that changes the weights, but not how long the run is."""
    counted = {name: value for name, value in arguments.items() if name not in NOT_IN_FINGERPRINT}
    identity = [sorted(counted.items()), dataset_hash, model_hash, global_batch, seed]
    return hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()


def without_secrets(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name not in SECRETS}


def seed_of(seed: int | None, fingerprint: str) -> int:
    """`seed`, else one that follows from the run's fingerprint: every process and every restart has the same."""
    return int(fingerprint[-8:], 16) if seed is None else seed


def output_folder(asked: Path | None, dataset: str, base: Path, fingerprint: str) -> Path:
    """`asked`, else one in output/ that this run alone has; UserError where the result would replace its base."""
    if asked and asked.resolve() == base.resolve():
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


def check_same_run(folder: Path, fingerprint: str, has_something: bool = True) -> dict | None:
    """run.json of an earlier start of this very run, or None; UserError where the folder holds another run.

    One that has neither finished nor left a checkpoint (`has_something`) is in nobody's way.
    """
    earlier = read_run(folder)
    if earlier and earlier.get("fingerprint") != fingerprint:
        if not (earlier.get("finished") or has_something):
            return None
        raise UserError(
            f"{folder} holds another run (other data, model, batch or arguments); name another --output_dir, "
            "or leave the flag out: each run then gets a folder of its own"
        )
    return earlier


def shown(path: Path | str) -> str:
    """A path as one would type it: relative where it lies below the current folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def write_run(folder: Path, run: dict) -> None:
    """run.json, replaced as a whole, so that a reader never sees half of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / RUN_FILE, json.dumps(run, indent=2, default=str) + "\n")
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written ({error.strerror})") from None


def newest_finished_run(outputs: Path = OUTPUTS) -> Path | None:
    """The folder under `outputs` whose run finished last, by the time in its run.json; None where none has."""
    runs = {path.parent: _run_or_nothing(path.parent) for path in outputs.glob(f"*/{RUN_FILE}")}
    finished = {folder: run["finished_at"] for folder, run in runs.items() if run.get("finished")}
    return max(finished, key=finished.get, default=None)


def _run_or_nothing(folder: Path) -> dict:
    try:
        return read_run(folder) or {}
    except UserError:
        return {}
