"""A captioned folder as the trainer reads it: every row and every picture is checked before anything is trained."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from data.caption_variants import caption_variants, suggest_prompts
from data.file_facts import FileFacts
from data.images import read_image_size
from data.input_files import InputFile
from data.masks import Mask, alpha_mask, find_masks, refuse_masks
from data.tags import TagSettings
from metadata.containers import find_containers
from metadata.files import MetadataFile
from metadata.packed_captions import read_packed_captions
from metadata.reading import CaptionRow, read_captions


@dataclass(frozen=True)
class Picture(InputFile):
    """A picture of the data set and its captions; width and height in pixels, after its EXIF orientation."""

    width: int
    height: int
    caption_groups: tuple[tuple[str, ...], ...]  # samples choose a group, then a caption in it, each equally often
    trigger: str | None = None  # the phrase in front of every caption
    row_captions: tuple[str, ...] = ()  # as they stand in the metadata file
    folder: Path = Path()  # of its data set
    repeats: float = 1.0  # how often a pass over the data set uses it
    whole_groups: tuple[int, ...] = ()  # those of whole captions, not of shorter variants
    as_written: tuple[str, ...] = ()  # the lists of tags of which samples have other orders
    mask: Mask | None = None  # where the loss counts; None: everywhere
    noun: ClassVar[str] = "picture"

    @property
    def captions(self) -> list[str]:
        return [*self.as_written, *(caption for group in self.caption_groups for caption in group)]

    @property
    def whole_captions(self) -> list[str]:
        """As the rows have them, with the trigger."""
        return [with_trigger(caption, self.trigger) for caption in self.row_captions]

    @property
    def base_caption(self) -> str:
        """The first caption as the base model is prompted: without the trigger, which it does not know."""
        return _without_trigger(self.captions[0], self.trigger)

    @property
    def short_prompts(self) -> list[str]:
        """Short forms of the first caption, with the trigger, that the fine-tuned model can be prompted with."""
        caption = _undo_with_trigger(self.captions[0], self.trigger)
        return [with_trigger(prompt, self.trigger) for prompt in suggest_prompts(caption)]


class Columns(NamedTuple):
    """Under which names rows have what is read of them."""

    caption: str = "text"
    image: str = "image"  # in parquet files


USUAL_COLUMNS = Columns()


def read_pictures(
    folder: Path,
    short_captions: bool,
    columns: Columns = USUAL_COLUMNS,
    trigger: str | None = None,
    files: Sequence[MetadataFile] | None = None,
    facts: FileFacts | None = None,
) -> list[Picture]:
    """All pictures of a captioned folder, or of the rows in `files`; `short_captions` adds shorter forms of captions.

    Of tar shards and parquet files, `folder` is what names them. With `facts` of earlier starts no picture is read
    that has not changed since.

    Raises UserError that lists every bad row and every picture that cannot be read.
    """
    pictures = []

    def add_picture(row: CaptionRow) -> None:
        path, captions = row.path(folder), row.captions
        try:
            width, height = InputFile(path, facts=facts).fact("size", lambda: read_image_size(path))
        except ValueError as fault:
            raise ValueError(f"{row.file_name}: {fault}") from None
        groups, whole = _caption_groups(captions, short_captions, trigger)
        mask = Mask(folder / row.mask, facts=facts) if row.mask else None
        about = width, height, groups, trigger, captions, folder, row.repeats, whole
        pictures.append(Picture(path, *about, mask=mask, facts=facts))

    if containers := find_containers(folder):
        read_packed_captions(containers, *columns, add_picture)
    else:
        read_captions(folder, columns.caption, add_picture, files)
    return pictures


def with_masks(folder: Path, pictures: Sequence[Picture], from_alpha: bool) -> list[Picture]:
    """The pictures of a folder with their masks: files that their rows name or that are beside them, else
    `from_alpha` their own transparency.

    Raises UserError that lists the masks that belong to no picture or with another to the same.
    """
    named = {picture.path: picture.mask.path for picture in pictures if picture.mask}
    files, faults = find_masks(folder, [picture.path for picture in pictures], named)
    refuse_masks(faults)
    masked = []
    for picture in pictures:
        own = files.get(picture.path)
        mask = Mask(own, facts=picture.facts) if own else alpha_mask(picture) if from_alpha else None
        masked.append(replace(picture, mask=mask) if mask else picture)
    return masked


def read_tags(picture: Picture, tags: TagSettings, short_captions: bool) -> Picture:
    """The picture with its lists of tags as `tags` say; they have no shorter variants. Other captions stay."""
    groups, whole = _caption_groups(picture.row_captions, short_captions, picture.trigger, tags)
    plain = [_undo_with_trigger(caption, picture.trigger) for caption in picture.row_captions]
    written = tuple(with_trigger(caption, picture.trigger) for caption in plain if tags.variants(caption))
    if not written:
        return picture
    return replace(picture, caption_groups=groups, whole_groups=whole, as_written=written)


def _caption_groups(
    captions: tuple[str, ...], short_captions: bool, trigger: str | None, tags: TagSettings | None = None
) -> tuple[tuple[tuple[str, ...], ...], tuple[int, ...]]:
    """(groups, which of them are of whole captions)"""
    if not short_captions and not tags:
        return (tuple(with_trigger(caption, trigger) for caption in captions),), (0,)
    groups: list[Sequence[str]] = []
    whole = []
    for caption in captions:
        # The forms are made of the caption alone: the file may have the trigger in it already.
        plain = _undo_with_trigger(caption, trigger)
        orders = tags.variants(plain) if tags else ()
        whole.append(len(groups))
        groups += [orders] if orders else caption_variants(plain) if short_captions else [(plain,)]
    if trigger:
        groups = [[with_trigger(caption, trigger) for caption in group] for group in groups]
    return tuple(map(tuple, groups)), tuple(whole)


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
    """A hash of all that is learned from the data set, in order: bytes of pictures and masks, captions, repeats."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(bytes.fromhex(picture.sha256))
        digest.update(repr(picture.caption_groups).encode())
        if picture.mask:
            digest.update(f"mask {picture.mask.key}".encode())
        if picture.repeats != 1:  # or every older run would count as another
            digest.update(f"repeats {picture.repeats!r}".encode())
    return digest.hexdigest()
