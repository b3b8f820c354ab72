"""The key `repeats` of a row: which numbers it takes, and that what it does not take is named with its line."""

import json
import math

import pytest

from captioned_folder import write_captioned_folder
from captioning.audit import audit_rows
from metadata.reading import read_captions, scan_captions
from metadata.repeats import repeats_fault, repeats_of
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("row", "number"),
    [({}, 1), ({"repeats": None}, 1), ({"repeats": ""}, 1), ({"repeats": 3}, 3), ({"repeats": "0.5"}, 0.5)],
)
def test_a_row_is_used_as_often_as_it_says_and_else_once(row, number):
    assert repeats_of(row) == number and repeats_fault(row) is None


@pytest.mark.parametrize("value", [0, -1, True, "often", [2], math.nan, math.inf, 10**400, 1e9])
def test_any_other_number_is_refused(value):
    with pytest.raises(ValueError, match="`repeats`"):
        repeats_of({"repeats": value})


@pytest.fixture
def folder(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "a", "2.jpg": "b"})
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["repeats"], rows[1]["repeats"] = 2, "twice"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_wrong_number_is_named_with_its_line_in_training_and_by_check(folder):
    with pytest.raises(UserError, match='line 2: `repeats`.*"twice"'):
        read_captions(folder)
    found = list(audit_rows(scan_captions(folder), ["1.jpg", "2.jpg"]))
    assert [finding.text for finding in found if "line 2" in finding.text and "`repeats`" in finding.text]


def test_a_csv_has_a_column_for_it(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,repeats\n1.jpg,a,0.5\n2.jpg,b,\n")
    assert [row.repeats for row in read_captions(folder)] == [0.5, 1]


def test_a_row_of_a_sub_folder_may_not_contradict_it(tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "a"})
    sub = write_captioned_folder(folder / "sub", {"2.jpg": "b"})
    row = {"file_name": "sub/2.jpg", "text": "b", "repeats": 2}
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="`repeats`"):
        read_captions(folder)
    (sub / "metadata.jsonl").write_text(json.dumps(row | {"file_name": "2.jpg"}) + "\n")
    assert [row.repeats for row in read_captions(folder)] == [1, 2]
