"""A captioned folder's pictures and captions in a tar shard or a parquet file."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

Member = tuple[str, bytes]


def write_shard(path: Path, members: Iterable[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def samples_of(folder: Path) -> list[Member]:
    """The members of a shard that has the pictures of a captioned folder, in order: 0000.jpg, 0000.txt, ..."""
    members = []
    for number, row in enumerate(rows_of(folder)):
        members.append((f"{number:04d}.jpg", (folder / row["file_name"]).read_bytes()))
        members.append((f"{number:04d}.txt", row["text"].encode()))
    return members


def write_table(path: Path, pictures: list, rows_in_group: int = 2, **columns: list) -> Path:
    """`pictures` are {"bytes": ..., "path": ...} or bytes."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, **columns}), path, row_group_size=rows_in_group)
    return path


def table_of(path: Path, folder: Path) -> Path:
    """A parquet file with the pictures and captions of a captioned folder, in order."""
    rows = rows_of(folder)
    pictures = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    return write_table(path, pictures, text=[row["text"] for row in rows])
