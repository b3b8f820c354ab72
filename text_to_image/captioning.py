"""Captions pictures with a BLIP model (Li et al. 2022, arXiv:2201.12086) through transformers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.utils import logging

from captions import append_captions
from data import measure, open_picture
from devices import choose_device
from errors import UserError, WorkError, first_line, harmless


@dataclass(frozen=True)
class Captioner:
    model: BlipForConditionalGeneration
    processor: BlipProcessor

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_captioner(name: str) -> Captioner:
    """A BLIP captioner from a folder or a hub id, safetensors only; UserError when there is none by that name."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
        if model_type != "blip":
            raise UserError(f"--model {name} is of type {model_type!r}; a BLIP captioner is needed")
        processor = BlipProcessor.from_pretrained(name)
        model = BlipForConditionalGeneration.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load a BLIP captioner from --model {name}: {first_line(error)}") from None
    return Captioner(model.to(choose_device()).eval(), processor)


def caption_pictures(
    pictures: Sequence[Path], captioner: Captioner, *, batch_size: int, max_new_tokens: int, prompt: str | None
) -> None:
    """Appends a row for each of `pictures` (of one folder) to its metadata.jsonl, batch by batch.

    Raises WorkError that names the pictures without a caption, once all the others have theirs.
    """
    failures: list[str] = []
    readable = _open_pictures(pictures, failures)
    while batch := list(islice(readable, batch_size)):
        names, images = zip(*batch, strict=True)
        texts = describe(captioner, images, max_new_tokens=max_new_tokens, prompt=prompt)
        captions = dict(zip(names, texts, strict=True))
        append_captions(pictures[0].parent, [(name, text) for name, text in captions.items() if text])
        failures += [f"{name}: the model found no words for it" for name, text in captions.items() if not text]
        for name, text in captions.items():
            print(harmless(f"{name}: {text}"), flush=True)
    if failures:
        raise WorkError("\n  ".join([f"{len(failures)} of {len(pictures)} pictures have no caption:", *failures]))


@torch.inference_mode()
def describe(
    captioner: Captioner, images: Sequence[Image.Image], *, max_new_tokens: int, prompt: str | None = None
) -> list[str]:
    """One caption for each image, beginning with `prompt`; greedy search, so that a picture always gets the same."""
    words = {"text": [prompt] * len(images)} if prompt else {}
    inputs = captioner.processor(images=list(images), return_tensors="pt", **words).to(captioner.device)
    tokens = captioner.model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)
    return [text.strip() for text in captioner.processor.batch_decode(tokens, skip_special_tokens=True)]


def _open_pictures(paths: Iterable[Path], failures: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """(file name, image) of each picture that opens; the others are described in `failures`."""
    for path in paths:
        try:
            measure(path)  # says in words what is wrong with a picture
            yield path.name, open_picture(path)
        except (OSError, ValueError) as error:
            failures.append(f"{path.name}: {error}")
