"""The LoRAs that --lora names: their files and strengths, the runs that trained them, and what those sampled from."""

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from bases.checkpoint_files import MODELSPEC_PREDICTION
from bases.lora_files import PEFT_CONFIG, PEFT_FILE
from models.folders import FolderLike, loading_errors
from models.lora import LORA_FILE
from runs.records import read_run
from runtime.errors import UserError
from runtime.hub import asking_hub, hub_status, refuse_missing_path
from runtime.paths import display_path


class ScaledLora(NamedTuple):
    file: Path
    scale: float


def choose_scales(asked: Sequence[float], own: int, named: int) -> list[float]:
    """The strength of each LoRA: of the model's `own` (one or none), then of those that --lora names."""
    if not own + named:
        if wrong := [scale for scale in asked if scale != 1]:
            raise UserError(f"--lora_scale {wrong[0]:g}: there is no LoRA; name one with --lora FOLDER")
        return []
    if len(asked) not in {0, named, own + named}:
        raise UserError(
            f"--lora_scale is given {len(asked)} times, --lora {named} times; give one for each, in the same order"
        )
    return [1.0] * (own + named - len(asked)) + list(asked)


def find_lora(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return _lora_in(path, name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--lora {name}: not a safetensors file; other formats can run code when they are read")
        return path
    return _download_lora(name)


def _download_lora(name: str) -> Path:
    refuse_missing_path(f"--lora {name}", name)
    with asking_hub(f"--lora {name}: no such file or folder, and not found on the hub"):
        try:
            return Path(hf_hub_download(name, LORA_FILE))
        except EntryNotFoundError as error:  # on the hub, or offline in its cache: peft's files then
            with contextlib.suppress(EntryNotFoundError):
                if hub_status(error) in (None, 404):
                    hf_hub_download(name, PEFT_CONFIG)
                    return Path(hf_hub_download(name, PEFT_FILE))
            raise


def _lora_in(folder: Path, name: str) -> Path:
    known = [folder / file for file in (LORA_FILE, PEFT_FILE) if (folder / file).is_file()]
    files = known[:1] or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"--lora {name}: {len(files)} safetensors files in it; name the file")
    return files[0]


def run_of_lora(file: Path) -> dict[str, Any]:
    """run.json of the run that trained it: beside the file, or above its checkpoint."""
    return read_run(file.parent) or read_run(file.parent.parent) or {}


def recorded_facts(file: Path) -> dict[str, Any]:
    """As `run_of_lora`, else what the file's own metadata say in its way (ModelSpec's and kohya's keys)."""
    if run := run_of_lora(file):
        return run
    with loading_errors(file.parent, file.name), safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    predictions = {name: prediction for prediction, name in MODELSPEC_PREDICTION.items()}
    prediction_type = predictions.get(metadata.get("modelspec.prediction_type", ""))
    if metadata.get("ss_v_parameterization") == "True":
        prediction_type = "v_prediction"
    if not prediction_type:
        return {}
    arguments = {
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": metadata.get("ss_zero_terminal_snr") == "True",
    }
    return {"trigger": metadata.get("modelspec.trigger_phrase"), "arguments": arguments}


# --- the noise schedule that they were trained on -------------------------------------------------------------------


class NoiseSchedule(NamedTuple):
    """What sampling must know of the training."""

    prediction_type: str
    zero_snr: bool

    def __str__(self) -> str:
        return f"{self.prediction_type}{' with zero terminal SNR' if self.zero_snr else ''}"


def trained_schedule(run: Mapping[str, Any], base: FolderLike) -> NoiseSchedule:
    """Of the run: its arguments win over the scheduler of its own base, or of `base` where that is not at hand."""
    arguments = run.get("arguments", {})
    own = _scheduler_config(Path(run.get("base_model", base)))
    config = own or _scheduler_config(base)
    prediction_type = arguments.get("prediction_type") or config.get("prediction_type", "epsilon")
    zero_snr = arguments.get("rescale_betas_zero_snr") or config.get("rescale_betas_zero_snr", False)
    return NoiseSchedule(prediction_type, bool(zero_snr))


def _scheduler_config(folder: FolderLike) -> dict[str, Any]:
    """Empty where it cannot be read: loading the sampler says why."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")))
    return {}


def schedule_note(runs: Mapping[Path, Mapping[str, Any]], own: NoiseSchedule, base: FolderLike) -> str | None:
    """A line about the first LoRA that was trained on another schedule than `own`, the model's; None if none was.

    `runs` has the run of each LoRA file, empty where it is not known. UserError where two LoRAs contradict each other:
    whichever is sampled from, one of them would add noise.
    """
    schedules = {file: trained_schedule(run, base) for file, run in runs.items() if run}
    for (one, first), (other, second) in itertools.pairwise(schedules.items()):
        if first != second:
            raise UserError(
                f"--lora: {display_path(one)} was trained for {first}, {display_path(other)} for {second}; use one of "
                "them alone"
            )
    return next(
        (
            f"{display_path(file)} was trained for {schedule}, the model it is used with for {own}"
            for file, schedule in schedules.items()
            if schedule != own
        ),
        None,
    )
