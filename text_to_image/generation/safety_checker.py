"""The safety checker that some models bring: a picture it flags is replaced by a black one, and named."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from models.folders import FolderLike
from models.loading import load_feature_extractor, load_safety_checker


class ImageChecker(Protocol):
    def check(self, images: Sequence[Image.Image]) -> tuple[Sequence[Image.Image], list[bool]]:
        """The pictures, with flagged ones in black, and for each whether it was flagged."""


class SafetyChecker:
    """The checker of the pipeline in `folder`, which Stable Diffusion 1.x has."""

    def __init__(self, folder: FolderLike, device: torch.device):
        self.feature_extractor = load_feature_extractor(folder)
        self.checker = load_safety_checker(folder).to(device)

    def check(self, images: Sequence[Image.Image]) -> tuple[Sequence[Image.Image], list[bool]]:
        clip_input = self.feature_extractor(list(images), return_tensors="pt").pixel_values.to(self.checker.device)
        # It blackens numpy arrays in place; the pictures are done below, so it is given placeholders.
        _, flagged = self.checker(clip_input=clip_input, images=[np.zeros((1, 1, 3)) for _ in images])
        pairs = zip(images, flagged, strict=True)
        return [Image.new("RGB", image.size) if bad else image for image, bad in pairs], list(map(bool, flagged))


class NoSafetyChecker:
    """For a model without one, and for --no_safety_checker."""

    def check(self, images: Sequence[Image.Image]) -> tuple[Sequence[Image.Image], list[bool]]:
        return images, [False] * len(images)
