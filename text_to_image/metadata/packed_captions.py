"""The captions in tar shards and parquet files, checked as those of a metadata file are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metadata import parquet_files, tar_shards
from metadata.image_files import METADATA, PARQUET
from metadata.reading import CaptionRow, RowCheck, captions_of
from metadata.repeats import repeats_of
from runtime.errors import UserError


@dataclass(frozen=True)
class PackedRow(CaptionRow):
    """Its file name is 'CONTAINER/MEMBER', without the folders that the container is in."""

    picture: Path = Path()

    def path(self, folder: Path) -> Path:
        return self.picture


def read_packed_captions(containers: Sequence[Path], column: str, image_column: str, check: RowCheck) -> None:
    """Calls `check` with the row of each picture that has a caption, in order.

    UserError that lists every bad sample, or says that there is no caption.
    """
    faults, number = [], 0
    for container in containers:
        for member, raw in _read_rows(container, column, image_column):
            number += 1
            picture = container / member
            name = str(picture.relative_to(container.parent) if container in picture.parents else picture)
            try:
                row = _checked_row(picture, name, number, raw, column)
            except ValueError as fault:
                faults.append(f"{name}: {fault}")
                continue
            try:
                check(row)
            except ValueError as fault:  # which names the picture itself
                faults.append(str(fault))
    _refuse(containers, faults)
    if not number:
        raise UserError(_no_captions_message(containers, column))


def _read_rows(container: Path, column: str, image_column: str) -> Iterator[tuple[str, dict | ValueError]]:
    if container.suffix.lower() == PARQUET:
        return iter(parquet_files.read_rows(container, column, image_column))
    return tar_shards.read_rows(container, column)


def _checked_row(picture: Path, name: str, number: int, raw: dict | ValueError, column: str) -> PackedRow:
    if isinstance(raw, ValueError):
        raise raw
    return PackedRow(name, captions_of(raw, column), number, repeats_of(raw), picture=picture)


def _refuse(containers: Sequence[Path], faults: Sequence[str]) -> None:
    if faults:
        count = "1 bad sample" if len(faults) == 1 else f"{len(faults)} bad samples"
        place = containers[0] if len(containers) == 1 else containers[0].parent
        raise UserError("\n  ".join([f"{count} in {place}:", *faults]))


def _no_captions_message(containers: Sequence[Path], column: str) -> str:
    others = f" and the {len(containers) - 1} others" if len(containers) > 1 else ""
    return (
        f"no picture with a caption in {containers[0]}{others}; a tar shard has 1.txt, or 1.json with the key "
        f"`{column}`, for 1.jpg (a {METADATA} in it is not read), and a parquet file a row for each picture"
    )
