"""Defaults that come with a model, because what suits 4 M parameters does not suit 860 M.

Two small JSON files beside `model_index.json`; flags win over both, and fine-tuning copies both to its result:

- `training_defaults.json`: flags of train_text_to_image.py without the dashes, such as {"learning_rate": 3e-4};
- `generation_defaults.json`: flags of inference.py, such as {"guidance_scale": 4.0, "steps": 25}.

Standard library only: this is read before anything heavy is imported.
"""

import argparse
import json
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.flags import FlagParser, given_flags, non_negative_float

TRAINING_DEFAULTS, GENERATION_DEFAULTS = "training_defaults.json", "generation_defaults.json"
FROM_FLAG, FROM_SCRIPT = "flag", "default"  # where a value comes from; else it is the name of a file
# Custom in the field; XL's UNet takes less of both.
GUIDANCE_SCALE, XL_GUIDANCE_SCALE = 7.5, 5.0
LEARNING_RATE, XL_LEARNING_RATE = 1e-5, 5e-6  # of a whole UNet
REAL_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # the scripts' example of a full-size model


def merge_defaults(
    parser: FlagParser, given: dict[str, Any], file: Path, not_allowed: Collection[str]
) -> argparse.Namespace:
    """Flags win over the model's `file` (which may be missing), the file wins over the script's own defaults.

    `origins` of the result says for every name which of the three its value is from. Raises UserError that names the
    file for a key that is not a flag or is `not_allowed` in a file, and for a wrong value.
    """
    from_file = _read_flags(parser, file)
    if wrong := sorted(set(from_file).intersection(not_allowed)):
        raise UserError(f"{file}: {', '.join(wrong)} cannot be set by a model, only as a flag")
    from_script = vars(parser.parse_args([]))
    origins = {
        name: FROM_FLAG if name in given else file.name if name in from_file else FROM_SCRIPT for name in from_script
    }
    return argparse.Namespace(**{**from_script, **from_file, **given}, origins=origins)


def recommended_guidance_scale(folder: PathLike[str]) -> float | None:
    """The guidance scale that the model in `folder` recommends in generation_defaults.json, if it does."""
    file = Path(folder) / GENERATION_DEFAULTS
    values = _read_json(file)
    try:
        return non_negative_float(str(values["guidance_scale"])) if "guidance_scale" in values else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{file}: guidance_scale: {error}") from None


def _read_flags(parser: FlagParser, file: Path) -> dict[str, Any]:
    """The file's values, parsed as on a command line, so that names, types and ranges are checked."""
    argv = [_as_flag(name, item) for name, value in _read_json(file).items() for item in _as_list(value)]
    try:
        return given_flags(parser, argv)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f'{file}: must hold one JSON object, such as {{"learning_rate": 1e-5}}')
    return values


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _as_flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name}={value}"
