"""Many tensors in few files: shards in safetensors format, whose headers are the index. For what can be made again.

A shard is written whole and never changed. A start reads the headers alone, and compares the size of each file with
what its header says; a tensor's checksum is compared when it is read. A damaged shard is removed, so that the next
start makes again what was in it, and nothing else.
"""

import contextlib
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file

from runtime.errors import InputChanged, WorkError, first_line
from runtime.files import atomic_write, remove_stale_partial_files, set_mode, umask

MOST_BYTES, MOST_ROWS = 256 << 20, 1024  # in a shard; a row is what belongs together, such as a picture's tensors
MOST_SECONDS = 300.0  # of work in a shard: what kill -9 costs
NAME = "shard-{}.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_ROW = np.dtype(
    [("name", "u8"), ("file", "u4"), ("kind", "u4"), ("begin", "u8"), ("bytes", "u8"), ("checksum", "u4")]
)


class TensorSpec(NamedTuple):
    """What tensors have in common."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorShards:
    """The tensors in the shards of a folder, by name. The index is a table, about 40 bytes a tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: list[Path] = []
        self._kinds: dict[TensorSpec, int] = {}
        self._kind_list: list[TensorSpec] = []
        self._table = np.empty(0, INDEX_ROW)
        self.refresh()

    def refresh(self, names: Iterable[str] = ()) -> None:
        """Reads the index of the shards that are new in the folder, and of those named, which a network file system
        may not list yet. A damaged one is removed. WorkError where one cannot be read."""
        listed = {path.name for path in self.folder.glob(NAME.format("*"))}
        tables = [self._table]
        for name in sorted({*listed, *names}.difference(self.file_names)):
            table = self._read_index(self.folder / name, len(self._files))
            if table is not None:
                self._files.append(self.folder / name)
                tables.append(table)
        table = np.concatenate(tables)
        self._table = table[np.argsort(table["name"], kind="stable")]  # of two of a name the first counts

    @property
    def file_names(self) -> list[str]:
        """Of the shards whose index was read."""
        return [path.name for path in self._files]

    def has(self, names: Sequence[str]) -> np.ndarray:
        """Whether each is there: booleans."""
        wanted = np.fromiter(map(_hash, names), np.uint64, len(names))
        if not len(self._table):
            return np.zeros(len(wanted), bool)
        at = np.searchsorted(self._table["name"], wanted)
        return self._table["name"][np.minimum(at, len(self._table) - 1)] == wanted

    def read(self, name: str) -> torch.Tensor:
        """Raises InputChanged that names the shard where it is gone or damaged; a damaged one is removed."""
        wanted = np.uint64(_hash(name))
        at = int(np.searchsorted(self._table["name"], wanted))
        if at == len(self._table) or self._table[at]["name"] != wanted:
            _refuse(self.folder, "a shard is not there that another process has written")
        place = self._table[at]
        path, kind = self._files[place["file"]], self._kind_list[place["kind"]]
        content = self._read_bytes(path, int(place["begin"]), int(place["bytes"]))
        if _checksum(name, content) != place["checksum"]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            left = ", and cannot be removed; remove it" if path.exists() else ""
            _refuse(path, f"damaged: a checksum differs{left}")
        if not content:
            return torch.empty(kind.shape, dtype=kind.dtype)
        return torch.frombuffer(content, dtype=kind.dtype).reshape(kind.shape)

    def _read_bytes(self, path: Path, begin: int, length: int) -> bytearray:
        try:
            with open(path, "rb") as file:  # buffered: it reads on where a network disk gives less than was asked for
                file.seek(begin)
                return bytearray(file.read(length))
        except FileNotFoundError:
            _refuse(path, "no such file any more")
        except OSError as error:
            _refuse(path, f"cannot be read any more ({first_line(error)})")

    def _read_index(self, path: Path, number: int) -> np.ndarray | None:
        """The places of its tensors; None where it is gone or damaged."""
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(length := int.from_bytes(file.read(8), "little")))
                size = os.fstat(file.fileno()).st_size
            table = self._table_of(header, 8 + length, number)
            if size != (table["begin"] + table["bytes"]).max(initial=8 + length):
                raise ValueError("its size differs")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WorkError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return table

    def _table_of(self, header: dict[str, Any], data: int, number: int) -> np.ndarray:
        """`data`: where in the file the tensors begin."""
        checksums = header.pop("__metadata__")
        rows = []
        for name, about in header.items():
            kind = TensorSpec(DTYPES[about["dtype"]], tuple(about["shape"]))
            begin, end = about["data_offsets"]
            if end - begin != math.prod(kind.shape) * kind.dtype.itemsize:
                raise ValueError("not the size of its shape")
            rows.append(
                (_hash(name), number, self._number_of(kind), data + begin, end - begin, int(checksums[name], 16))
            )
        return np.array(rows, INDEX_ROW)

    def _number_of(self, kind: TensorSpec) -> int:
        if kind not in self._kinds:
            self._kinds[kind] = len(self._kind_list)
            self._kind_list.append(kind)
        return self._kinds[kind]


class ShardWriter:
    """Collects rows and writes them as shards; at the end, also in an error, what has been collected."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[str] = []  # the files' names
        self._clear()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, row: dict[str, torch.Tensor]) -> None:
        """Tensors by name, all of which will be in one shard. Raises WorkError as `flush`."""
        self._tensors |= row
        self._rows += 1
        self._bytes += sum(tensor.nbytes for tensor in row.values())
        if self._rows >= MOST_ROWS or self._bytes >= MOST_BYTES or time.monotonic() - self._began >= MOST_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Raises WorkError where the folder cannot be written to, or the disk is full."""
        if not self._tensors:
            return
        try:
            self._write()
        except OSError as error:
            raise WorkError(f"{self.folder}: encodings cannot be written there ({error.strerror or error})") from None

    def _write(self) -> None:
        if not self.written:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale_partial_files(self.folder)
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors.items()}
        checksums = {name: f"{_checksum(name, _bytes(tensor)):x}" for name, tensor in tensors.items()}
        # Named after its bits: those of another kind of processor may differ, and never replace what a run reads.
        shard = NAME.format(hashlib.sha256(repr(checksums).encode()).hexdigest()[:32])
        with atomic_write(self.folder / shard, durable=False) as partial:  # its size shows what a crash left of it
            save_file(tensors, partial, checksums)
            set_mode(partial, 0o666 & ~umask())  # it gives the file to its owner alone
        self.written.append(shard)
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._rows = self._bytes = 0
        self._began = time.monotonic()


def _refuse(path: Path, fault: str) -> NoReturn:
    raise InputChanged(f"{path}: {fault}; the same command makes again what was in it, and goes on")


def _hash(name: str) -> int:
    """64 bits: of two million names two are alike with a probability of 1e-7, and then a checksum differs."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _checksum(name: str, content: bytes | bytearray) -> int:
    return zlib.crc32(content, zlib.crc32(name.encode()))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
