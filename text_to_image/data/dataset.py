"""A captioned folder as the trainer reads it: every row and every picture is checked before anything is trained."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

from data.caption_variants import caption_variants, suggest_prompts
from data.images import read_image_size
from metadata.files import MetadataFile
from metadata.reading import CaptionRow, read_captions
from runtime.errors import InputChanged


@dataclass(frozen=True)
class Picture:
    """A picture of the data set and its captions; width and height in pixels, after its EXIF orientation."""

    path: Path
    width: int
    height: int
    caption_groups: tuple[tuple[str, ...], ...]  # samples choose a group, then a caption in it, each equally often
    trigger: str | None = None  # the phrase in front of every caption
    row_captions: tuple[str, ...] = ()  # as they stand in the metadata file

    @cached_property
    def sha256(self) -> str:
        """Of the file as it was when this was first asked for: before the run, which is known by it."""
        return hashlib.sha256(self._read()).hexdigest()

    def open(self) -> BytesIO:
        """The content that `sha256` is of. Raises InputChanged where the file is gone or has another.

        The hash takes a fortieth of the time of decoding, and leaves no moment in which the file could change unseen.
        """
        content = self._read()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputChanged(
                f"{self.path}: another picture than when the run began; put back the one that was there, and the same "
                "command goes on; with this one a run begins anew"
            )
        return BytesIO(content)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            fault = "no such file any more"
        except OSError as error:
            fault = f"cannot be read any more ({error.strerror})"
        raise InputChanged(f"{self.path}: {fault}; put it back as it was, and the same command goes on")

    @property
    def captions(self) -> list[str]:
        return [caption for group in self.caption_groups for caption in group]

    @property
    def base_caption(self) -> str:
        """The first caption as the base model is prompted: without the trigger, which it does not know."""
        return _without_trigger(self.captions[0], self.trigger)

    @property
    def short_prompts(self) -> list[str]:
        """Short forms of the first caption, with the trigger, that the fine-tuned model can be prompted with."""
        caption = _undo_with_trigger(self.captions[0], self.trigger)
        return [with_trigger(prompt, self.trigger) for prompt in suggest_prompts(caption)]


def read_pictures(
    folder: Path,
    short_captions: bool,
    column: str = "text",
    trigger: str | None = None,
    files: Sequence[MetadataFile] | None = None,
) -> list[Picture]:
    """All pictures of a captioned folder, or of the rows in `files`; `short_captions` adds shorter forms of captions.

    Raises UserError that lists every bad row and every picture that cannot be read.
    """
    pictures = []

    def add_picture(row: CaptionRow) -> None:
        try:
            width, height = read_image_size(row.path(folder))
        except ValueError as fault:
            raise ValueError(f"{row.file_name}: {fault}") from None
        groups = _caption_groups(row.captions, short_captions, trigger)
        pictures.append(Picture(row.path(folder), width, height, groups, trigger, row.captions))

    read_captions(folder, column, add_picture, files)
    return pictures


def _caption_groups(
    captions: tuple[str, ...], short_captions: bool, trigger: str | None
) -> tuple[tuple[str, ...], ...]:
    groups: Sequence[Sequence[str]] = [captions]
    if short_captions:
        # The forms are made of the caption alone: the file may have the trigger in it already.
        plain = [_undo_with_trigger(caption, trigger) for caption in captions]
        groups = [group for caption in plain for group in caption_variants(caption)]
    return tuple(tuple(with_trigger(caption, trigger) for caption in group) for group in groups)


def with_trigger(caption: str, trigger: str | None) -> str:
    """'trigger, caption'; a caption that begins with the trigger stays as it is."""
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}"


def _undo_with_trigger(caption: str, trigger: str | None) -> str:
    return caption.removeprefix(f"{trigger}, ") if trigger else caption


def _without_trigger(caption: str, trigger: str | None) -> str:
    """The caption without a trigger at its start, however it goes on; one that is only the trigger stays."""
    return re.sub(rf"^{re.escape(trigger)}(?!\w)[,.:;]?\s*", "", caption) or caption if trigger else caption


def hash_dataset(pictures: Sequence[Picture]) -> str:
    """A hash of all that is learned from the data set: the pictures' bytes and their captions, in order."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(bytes.fromhex(picture.sha256))
        digest.update(repr(picture.caption_groups).encode())
    return digest.hexdigest()
