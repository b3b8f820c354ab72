"""The safety checker that a model may bring: it blackens a picture it objects to, and here that is told."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from models.folders import FolderLike, choose_variant, loading_errors

FOLDER = "safety_checker"


def has_checker(folder: FolderLike) -> bool:
    return (folder / FOLDER).is_dir() and (folder / "feature_extractor").is_dir()


class SafetyChecker:
    """The checker of the pipeline in `folder`, as Stable Diffusion 1.x has one."""

    def __init__(self, folder: FolderLike, device: torch.device):
        with loading_errors(folder, FOLDER):
            variant = choose_variant(folder, FOLDER)
            checker = StableDiffusionSafetyChecker.from_pretrained(
                Path(folder), subfolder=FOLDER, use_safetensors=True, variant=variant
            )
            self.features = CLIPImageProcessor.from_pretrained(Path(folder), subfolder="feature_extractor")
        self.checker = checker.to(device, torch.float32).eval()

    def check(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[bool]]:
        """The pictures, those it objects to in black, and which those are."""
        inputs = self.features(list(images), return_tensors="pt").pixel_values.to(self.checker.device)
        _, flagged = self.checker(clip_input=inputs, images=[np.zeros((1, 1, 3)) for _ in images])
        black = [Image.new("RGB", image.size) if bad else image for image, bad in zip(images, flagged, strict=True)]
        return black, [bool(bad) for bad in flagged]


class NoChecker:
    """For a model without one, or where none is wanted."""

    def check(self, images: Sequence[Image.Image]) -> tuple[Sequence[Image.Image], list[bool]]:
        return images, [False] * len(images)
