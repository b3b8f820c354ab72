"""Tar shards as WebDataset lays them out: 000123.jpg, with its caption in 000123.txt or 000123.json, is one sample.

Standard library only. A shard is read where it lies: the places of its members are listed once in each process, and
each member is then read at its place, by any thread.
"""

import errno
import os
import re
import tarfile
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from metadata.image_files import CAMERA_SUFFIXES, IMAGE_SUFFIXES, MASK_ENDINGS, OTHER_SUFFIXES, mask_key
from metadata.reading import CAPTION_COLUMNS, lacks_caption
from metadata.repeats import REPEATS
from metadata.rows import parse_row
from metadata.sidecars import parse_captions
from runtime.errors import UserError, first_line
from runtime.text_files import decode_utf8

Place = tuple[int, int]  # where a member begins in the file, and how many bytes it has
PackedRow = tuple[str, dict | ValueError]  # a member, and its row or what is wrong with it
TEXTS = ("txt", "caption")  # of a sample that has both the first counts
PICTURE_SUFFIXES = IMAGE_SUFFIXES | CAMERA_SUFFIXES | OTHER_SUFFIXES
BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
HIDDEN = re.compile(r"(?:^|/)(?:\.|__MACOSX/)")
PACK_AGAIN = "fetch it again, or pack it again: tar -cf NAME.tar FILES"


@dataclass
class Sample:
    """The members of a shard that have one name up to its first dot."""

    members: dict[str, str] = field(default_factory=dict)  # by what follows that dot, in small letters
    pictures: list[str] = field(default_factory=list)
    other_pictures: list[str] = field(default_factory=list)  # in formats that are not read

    @property
    def picture(self) -> str | None:
        """Of several the one without a second suffix, 1.jpg beside 1.depth.png; None where that leaves two."""
        if len(self.pictures) == 1:
            return self.pictures[0]
        plain = [name for name in self.pictures if "." not in PurePosixPath(name).stem]
        return plain[0] if len(plain) == 1 else None

    @property
    def unreadable(self) -> str | None:
        """A picture in a format that is not read, where there is no other."""
        return None if self.pictures else next(iter(self.other_pictures), None)


class MemberFault(ValueError):
    """What is wrong with a member of a shard."""

    def __init__(self, member: str, fault: object):
        super().__init__(str(fault))
        self.member = member


# --- Samples --------------------------------------------------------------------------------------------------------


def list_samples(shard: Path) -> list[Sample]:
    """In the order of the shard. UserError where it cannot be read."""
    samples: dict[str, Sample] = {}
    for name in _places(shard):
        folder, slash, last = name.rpartition("/")
        key, _, extension = last.partition(".")
        extension = extension.lower()
        suffix = f".{extension.rpartition('.')[2]}"
        if _is_mask(name, suffix):
            continue
        if not (sample := samples.get(f"{folder}{slash}{key}")):
            sample = samples[f"{folder}{slash}{key}"] = Sample()
        sample.members.setdefault(extension, name)
        if suffix in IMAGE_SUFFIXES:
            sample.pictures.append(name)
        elif suffix in PICTURE_SUFFIXES:
            sample.other_pictures.append(name)
    return list(samples.values())


def list_masks(shard: Path) -> list[str]:
    """The members that are masks by their names: 000123.mask.png for 000123.jpg."""
    return [name for name in _places(shard) if _is_mask(name, f".{name.rpartition('.')[2].lower()}")]


def _is_mask(name: str, suffix: str) -> bool:
    return (
        suffix in PICTURE_SUFFIXES
        and any(ending in name.lower() for ending in MASK_ENDINGS)
        and bool(mask_key(Path(name)))
    )


def read_rows(shard: Path, column: str) -> Iterator[PackedRow]:
    """For each sample with a caption its picture and its row, the caption under `column`; each fault with its member.

    The caption is the key `column` of the .json, else the .txt, else another key of the .json by which captions are
    known. UserError where the shard cannot be read.
    """
    places = _places(shard)
    with shard.open("rb") as file:
        for sample in list_samples(shard):
            try:
                row = _row_of(sample, lambda name: _read_at(file, places[name]), column)
                if (picture := _picture_of(sample, bool(row))) and row:
                    yield picture, row
            except MemberFault as fault:
                yield fault.member, fault


def _picture_of(sample: Sample, has_caption: bool) -> str | None:
    if sample.picture:
        return sample.picture
    if sample.pictures:
        first, second = sample.pictures[:2]
        raise MemberFault(first, f"{second} is a picture of the same sample, by their names up to the first dot")
    if has_caption and not sample.other_pictures:
        text = next(sample.members[kind] for kind in (*TEXTS, "json") if kind in sample.members)
        raise MemberFault(text, "a caption, and no picture of that name is in the shard")
    return None


def _row_of(sample: Sample, read: Callable[[str], bytes], column: str) -> dict | None:
    """None where the sample has no caption."""
    row = _read_json(sample, read)
    repeats = {REPEATS: row[REPEATS]} if REPEATS in row else {}
    if column in row and not lacks_caption(row, column):
        return {column: row[column], **repeats}
    if texts := _read_texts(sample, read):
        return {column: texts, **repeats}
    other = next((key for key in CAPTION_COLUMNS if key in row and not lacks_caption(row, key)), None)
    return {column: row[other], **repeats} if other else None


def _read_json(sample: Sample, read: Callable[[str], bytes]) -> dict:
    if not (name := sample.members.get("json")):
        return {}
    try:
        return parse_row(read(name).removeprefix(BOM_UTF8))
    except ValueError as fault:
        raise MemberFault(name, fault) from None


def _read_texts(sample: Sample, read: Callable[[str], bytes]) -> list[str]:
    """The captions of the first text file that has some."""
    for name in (sample.members[kind] for kind in TEXTS if kind in sample.members):
        try:
            if texts := parse_captions(decode_utf8(read(name)))[0]:
                return list(texts)
        except ValueError as fault:
            raise MemberFault(name, fault) from None
    return []


# --- Members --------------------------------------------------------------------------------------------------------


def read_member(shard: Path, name: str) -> bytes:
    """OSError where the member is not there any more, UserError where the shard cannot be read."""
    if (place := _places(shard).get(name)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(shard / name))
    with shard.open("rb") as file:
        return _read_at(file, place)


def _read_at(file: BinaryIO, place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _places(shard: Path) -> dict[str, Place]:
    """Where each file of the shard is, by its name; hidden ones are left out. UserError where it is no whole tar."""
    try:
        state = shard.stat()
        return _list_places(shard, state.st_size, state.st_mtime_ns)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard}: {getattr(error, 'strerror', None) or first_line(error)}; {PACK_AGAIN}") from None


@cache
def _list_places(shard: Path, size: int, time_ns: int) -> dict[str, Place]:
    places: dict[str, Place] = {}
    with shard.open("rb") as file:
        _refuse_compressed(shard, file)
        for name, place in _list_members(shard, file):
            name = name.removeprefix("./").lstrip("/")
            if ".." in name and ".." in PurePosixPath(name).parts:
                raise UserError(f"{shard}: the name {name} leads out of the shard; {PACK_AGAIN}")
            if name in places:
                raise UserError(f"{shard}: it has {name} twice; {PACK_AGAIN}")
            if not HIDDEN.search(name):
                places[name] = place
    return places


def _list_members(shard: Path, file: BinaryIO) -> Iterator[tuple[str, Place]]:
    """The files in order, up to the block of zeros that ends a tar.

    UserError where that is not reached: tarfile's own list takes a damaged header, or the end of the file, for it.
    """
    name, offset = None, 0
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (header := _read_at(file, (offset, BLOCK))) != bytes(BLOCK):
            try:
                if plain := _parse_plain(header):
                    name, place = plain[0], (offset + BLOCK, plain[1])
                    yield name, place
                else:
                    file.seek(offset)
                    member = tarfile.TarInfo.fromtarfile(tar)
                    name, place = member.name, (member.offset_data, member.size)
                    if not member.isdir():
                        _refuse_member(shard, member)
                        yield name, place
            except tarfile.TarError as error:
                raise UserError(f"{shard}: truncated or damaged after {name} ({error}); {PACK_AGAIN}") from None
            offset = place[0] + -(-place[1] // BLOCK) * BLOCK
    if name is None:
        raise UserError(f"{shard}: an empty tar; {PACK_AGAIN}")
    if file.read(1 << 20).strip(b"\0"):
        raise UserError(f"{shard}: more follows after its end, as where two tars were joined; {PACK_AGAIN}")


def _parse_plain(header: bytes) -> tuple[str, int] | None:
    """(name, bytes) of an ordinary file; None for what tarfile is to read, five times as slowly.

    POSIX.1-1988 (ustar), and what GNU tar and older ones write of it.
    """
    try:
        checksum, size = (int(header[start:end].strip(b" \0") or b"0", 8) for start, end in ((148, 156), (124, 136)))
    except ValueError:
        return None
    name, folder = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    # The checksum counts its own eight bytes as spaces.
    is_whole = len(header) == BLOCK and checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not is_whole or header[156] not in b"0\0" or name.endswith(b"/"):  # a folder, as old tars write it
        return None
    if header[257:263] == b"ustar\0" and folder:
        name = folder + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size


def _refuse_compressed(shard: Path, file: BinaryIO) -> None:
    head = file.read(BLOCK)
    file.seek(0)
    if packer := next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None):
        raise UserError(
            f"{shard}: compressed with {packer}, and a shard is read in place; unpack it and name the folder, or pack "
            "it again without compression: tar -cf NAME.tar FILES"
        )


def _refuse_member(shard: Path, member: tarfile.TarInfo) -> None:
    if member.issym() or member.islnk():
        raise UserError(
            f"{shard}: {member.name} is a link, and no picture or caption itself; pack the shard again: tar -cf "
            "NAME.tar --dereference --hard-dereference FILES"
        )
    if not member.isreg() or member.issparse():
        raise UserError(f"{shard}: {member.name} is no plain file; {PACK_AGAIN}")
