"""Parquet files with a column of pictures, as `datasets` writes them: their rows, and a picture by its row.

Read through pyarrow, which comes with `datasets`, one row group at a time. The picture in row 12 of train.parquet has
the path train.parquet/000012.jpg; in another column than `image` train.parquet/COLUMN/000012.jpg.
"""

import errno
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from metadata.image_files import IMAGE_SUFFIXES
from metadata.repeats import REPEATS
from metadata.rows import shown
from runtime.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMN = "image"
ROWS_AT_ONCE = 1000
GROUPS_KEPT = 2  # row groups in memory; each may have hundreds of pictures


def read_rows(table: Path, column: str, image_column: str) -> Iterator[tuple[str, dict]]:
    """The member of each picture and its row: the caption under `column`, and `repeats` where the table has it.

    UserError where the file cannot be read or has no such column.
    """
    with _opened(table) as parquet:
        names = parquet.schema_arrow.names
        _require_column(table, names, "caption_column", column)
        members = list_pictures(table, image_column)
        wanted = [column, *({REPEATS} & {*names})]
        yield from zip(members, _iterate(parquet, wanted), strict=True)


def list_pictures(table: Path, image_column: str) -> list[str]:
    """The members, one for each row. Where a row only names its picture, it is that file, from the table's folder.

    Reads no picture. UserError where the file cannot be read, has no column of pictures, or a relative name leads out
    of its folder.
    """
    with _opened(table) as parquet:
        _require_column(table, parquet.schema_arrow.names, "image_column", image_column)
        _require_pictures(table, parquet, image_column)
        groups = range(parquet.num_row_groups)
        names = [name for group in groups for name in _names(parquet, group, image_column)]
        is_named = [named for group in groups for named in _are_named(parquet, group, image_column)]
    folder = "" if image_column == IMAGE_COLUMN else f"{image_column}/"
    for name in (name for name, named in zip(names, is_named, strict=True) if named and name):
        inside = (table.parent / name).resolve().is_relative_to(table.parent.resolve())
        if not inside and not Path(name).is_absolute():  # as `datasets` names pictures of this machine
            raise UserError(f"{table}: a picture must stay inside its folder, found {shown(name)}")
    return [
        str(table.parent.absolute() / name) if named and name else f"{folder}{number:06d}{_suffix(name)}"
        for number, (name, named) in enumerate(zip(names, is_named, strict=True))
    ]


def read_picture(table: Path, member: Path) -> bytes:
    """The bytes of the picture. OSError where the row has none, UserError where the file cannot be read."""
    column = member.parent.as_posix() if member.parent.parts else IMAGE_COLUMN
    state = table.stat()
    number = int(member.name.split(".")[0])
    starts = _group_starts(table, state.st_size, state.st_mtime_ns)
    group = bisect_right(starts, number) - 1
    try:
        cell = _row_group(table, state.st_mtime_ns, group, column)[number - starts[group]].as_py()
    except (IndexError, KeyError):  # it was another file when the run began
        raise OSError(errno.ENODATA, f"there is no row {number} with `{column}`", str(table / member)) from None
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        raise OSError(errno.ENODATA, f"row {number} has no picture in `{column}`", str(table / member))
    return content


@cache
def _group_starts(table: Path, size: int, time_ns: int) -> list[int]:
    """The number of the first row of each row group."""
    with _opened(table) as parquet:
        counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return [0, *accumulate(counts)][:-1]


@lru_cache(maxsize=GROUPS_KEPT)
def _row_group(table: Path, time_ns: int, group: int, column: str) -> "pyarrow.ChunkedArray":
    with _opened(table) as parquet:  # each time: a pyarrow file is not for several threads or forked processes
        return parquet.read_row_group(group, columns=[column], use_threads=False).column(column)


def _require_pictures(table: Path, parquet: "pyarrow.parquet.ParquetFile", column: str) -> None:
    import pyarrow

    kind = parquet.schema_arrow.field(column).type
    has_bytes = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not has_bytes and not pyarrow.types.is_binary(kind) and not pyarrow.types.is_large_binary(kind):
        raise UserError(f"--image_column {column}: {table} has {kind} in it, and no pictures (their bytes)")


def _names(parquet: "pyarrow.parquet.ParquetFile", group: int, column: str) -> list[str | None]:
    """What the files of the pictures were called, where the table says it."""
    if _leaf(parquet, f"{column}.path") is None:
        return [None] * parquet.metadata.row_group(group).num_rows
    cells = parquet.read_row_group(group, columns=[f"{column}.path"], use_threads=False).column(column)
    return [(cell or {}).get("path") for cell in cells.to_pylist()]


def _are_named(parquet: "pyarrow.parquet.ParquetFile", group: int, column: str) -> list[bool]:
    """For each row whether it only names its picture: then no row of the group has bytes."""
    rows, leaf = parquet.metadata.row_group(group), _leaf(parquet, f"{column}.bytes")
    statistics = rows.column(leaf).statistics if leaf is not None else None
    return [statistics is not None and statistics.null_count == rows.num_rows] * rows.num_rows


def _leaf(parquet: "pyarrow.parquet.ParquetFile", name: str) -> int | None:
    """The number of a column within structs."""
    numbers = range(parquet.metadata.num_columns)
    return next((number for number in numbers if parquet.schema.column(number).path == name), None)


def _suffix(name: str | None) -> str:
    suffix = Path(name or "").suffix
    return suffix if suffix.lower() in IMAGE_SUFFIXES else ""


def _iterate(parquet: "pyarrow.parquet.ParquetFile", columns: list[str]) -> Iterator[dict]:
    for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _require_column(table: Path, names: list[str], flag: str, column: str) -> None:
    if column not in names:
        raise UserError(f"--{flag} {column}: {table} has {', '.join(names)}")


@contextmanager
def _opened(table: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """UserError where pyarrow is not there, and where it cannot read the file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{table}: parquet files are read with pyarrow; install it: pip install datasets") from None
    try:
        with pyarrow.parquet.ParquetFile(table) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table}: a parquet file that cannot be read ({first_line(error)}); fetch it again") from None
