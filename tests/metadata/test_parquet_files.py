"""Parquet files: rows in order, a picture by its row, whole row groups never more than two in memory."""

import pyarrow
import pyarrow.parquet
import pytest

from metadata import parquet_files
from metadata.containers import list_pictures, read_bytes
from metadata.packed_captions import read_packed_captions
from packed_data import write_table
from runtime.errors import UserError

PICTURES = [{"bytes": f"picture {number}".encode(), "path": f"{number}.jpg"} for number in range(5)]
TEXTS = [f"caption {number}" for number in range(5)]


def rows(*tables, column="text", image_column="image"):
    found = []
    read_packed_captions(tables, column, image_column, found.append)
    return found


def test_each_row_is_a_picture_with_its_captions_and_repeats(tmp_path):
    captions = [["one", "two"], ["three"], ["four"], ["five"], ["six"]]
    table = write_table(tmp_path / "a.parquet", PICTURES, captions=captions, repeats=[1.0, 0.5, 2.0, None, 1.0])
    found = rows(table, column="captions")
    assert [row.file_name for row in found] == [f"a.parquet/{number:06d}.jpg" for number in range(5)]
    assert found[0].captions == ("one", "two") and [row.repeats for row in found] == [1, 0.5, 2, 1, 1]
    assert [read_bytes(row.path(tmp_path)) for row in found] == [picture["bytes"] for picture in PICTURES]


def test_plain_bytes_in_another_column_are_found_again_by_the_path(tmp_path):
    table = write_table(tmp_path / "a.parquet", [b"-"] * 5, text=TEXTS, photo=[p["bytes"] for p in PICTURES])
    assert read_bytes(rows(table)[3].path(tmp_path)) == b"-"
    [*_, last] = rows(table, image_column="photo")
    assert last.path(tmp_path) == table / "photo" / "000004" and read_bytes(last.path(tmp_path)) == b"picture 4"


def test_no_more_than_two_row_groups_are_in_memory_and_each_is_read_once_in_order(tmp_path, monkeypatch):
    parquet_files._row_group.cache_clear()
    table = write_table(tmp_path / "a.parquet", PICTURES, text=TEXTS)
    for path in list_pictures(table)[0]:
        read_bytes(path)
    counts = parquet_files._row_group.cache_info()
    assert (counts.misses, counts.currsize) == (3, 2)


def test_a_row_that_names_its_picture_is_that_file(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"beside")
    named = [{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": str(tmp_path / "1.jpg")}]

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(named, kind), "text": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.path(tmp_path) for row in rows(tmp_path / "a.parquet")] == [tmp_path / "1.jpg"] * 2


@pytest.mark.parametrize("name", ["../out.jpg", "in/../../out.jpg"])
def test_a_picture_that_is_named_outside_the_tables_folder_is_refused(tmp_path, name):
    (tmp_path / "out.jpg").write_bytes(b"outside")
    (tmp_path / "in").mkdir()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pictures = pyarrow.array([{"bytes": None, "path": name}], kind)
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "text": ["t"]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(UserError, match=f"stay inside its folder.*{name}"):
        rows(tmp_path / "in" / "a.parquet")


def test_a_file_that_was_replaced_by_one_without_the_row_cannot_be_read(tmp_path):
    table = write_table(tmp_path / "a.parquet", PICTURES, text=TEXTS)
    [*_, last] = rows(table)
    for others in ({"text": TEXTS[:2]}, {"text": TEXTS[:2], "photo": [b"-"] * 2}):
        write_table(table, PICTURES[:2], **others)
        with pytest.raises(OSError, match="no row 4"):
            read_bytes(last.path(tmp_path))


def test_a_row_without_a_picture_or_a_caption_is_named(tmp_path):
    table = write_table(tmp_path / "a.parquet", [*PICTURES[:1], None, *PICTURES[2:]], text=[*TEXTS[:4], " "])
    with pytest.raises(UserError, match=r"a\.parquet/000004\.jpg: `text` is empty"):
        rows(table)
    with pytest.raises(OSError, match="row 1 has no picture in `image`"):
        read_bytes(table / "000001")


@pytest.mark.parametrize(
    ("columns", "word"),
    [({"column": "long"}, "--caption_column long"), ({"image_column": "pixels"}, "--image_column pixels"),
     ({"image_column": "text"}, "--image_column text")],
)  # fmt: skip
def test_a_column_that_is_not_there_or_no_pictures_is_refused_with_its_flag(tmp_path, columns, word):
    table = write_table(tmp_path / "a.parquet", PICTURES, text=TEXTS)
    with pytest.raises(UserError, match=rf"{word}: .*a\.parquet has "):
        rows(table, **columns)


def test_a_truncated_file_is_refused_by_name_and_later_is_a_file_that_cannot_be_read(tmp_path):
    table = write_table(tmp_path / "a.parquet", PICTURES, text=TEXTS)
    picture = rows(table)[0].path(tmp_path)
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet: a parquet file that cannot be read"):
        rows(table)
    with pytest.raises(OSError, match=r"a\.parquet"):
        read_bytes(picture)
