"""One picture from prompt to PNG: its settings, its plan and file name, and the batch it is generated in."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from metadata.image_files import WITHHELD_SUFFIX
from models.samplers import SamplingSettings


@dataclass(frozen=True)
class GenerationSettings:
    """What a picture depends on besides its prompt, its seed and the weights.

    The order of the fields is that of images.jsonl, and it enters the file names: another order renames every picture.
    """

    steps: int
    scheduler: str  # a key of SAMPLERS
    guidance_scale: float
    guidance_rescale: float
    negative_prompt: str
    height: int  # pixels
    width: int
    token_chunks: int  # the most that a prompt may fill; see models/text_encoding.py
    dtype: str  # of the UNet and the text encoder, a key of DTYPES
    safety_checker: bool
    model: str  # its name in images.jsonl

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(self.steps, self.guidance_scale, self.guidance_rescale)

    def to_row(self) -> dict[str, Any]:
        """The keys and values of images.jsonl, where the guidance scale is called `guidance`."""
        return {"guidance" if name == "guidance_scale" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class PlannedImage:
    """A picture to generate, and the name of its file."""

    prompt: str
    seed: int
    settings: GenerationSettings
    model_hash: str = ""
    model_title: str = ""  # a short name, for other programs
    extension: str = "png"  # or jpg
    checkpoint: str | None = None  # of the training run, RESULT where it is what the run made; None: no run

    @cached_property
    def file_name(self) -> str:
        """Pictures that differ in anything have different names; the same picture always has the same name."""
        words = "-".join(re.findall(r"\w+", self.prompt.lower())[:6])[:48] or "picture"
        # Not the model's name: its hash identifies it wherever it lies.
        identity = json.dumps([self.prompt, self.model_hash, {**self.settings.to_row(), "model": None}])
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-{self.seed:06d}.{self.extension}"

    @property
    def withheld_name(self) -> str:
        """Its name where the safety checker has replaced it by a black picture."""
        return self.file_name.replace(f".{self.extension}", f"{WITHHELD_SUFFIX}.{self.extension}")

    def to_row(self, name: str) -> dict[str, Any]:
        """The row of images.jsonl for the file `name`; with it the picture can be generated again."""
        row = {"file_name": name, "prompt": self.prompt, "seed": self.seed, **self.settings.to_row()}
        row |= {"model_hash": self.model_hash, "checkpoint": self.checkpoint}
        return row if name == self.file_name else {**row, "withheld": True}


@dataclass(frozen=True)
class GeneratedBatch:
    """Pictures that were generated together, and the plans they follow."""

    planned: Sequence[PlannedImage]
    images: Sequence[Image.Image]
    withheld: Sequence[bool]  # where the safety checker has replaced the picture by a black one
