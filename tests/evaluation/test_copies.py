"""check_copies.py: copies are counted and others are not, whatever lies in the folder; nothing is taken on trust."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from check_copies import parse_args
from clone import ROOT
from evaluation.copies import Scale, check_copies, generated_pictures, known_copies, training_pictures
from evaluation.similarity import StructuralSimilarity
from render_garments import render, sample_spec
from runtime.errors import UserError, WorkError

DATASET = ROOT / "dataset"


def picture(seed: int, kind: str | None = "jeans") -> Image.Image:
    return render(sample_spec(seed, kind), 168, 216, 1)


@pytest.fixture
def folder(tmp_path):
    """`folder(name, {file name: picture})` writes them and returns their folder."""

    def write(name: str, pictures: dict[str, Image.Image]) -> Path:
        (tmp_path / name).mkdir()
        for file, image in pictures.items():
            image.save(tmp_path / name / file)
        return tmp_path / name

    return write


@pytest.fixture
def last_line(capsys):
    """Checks in this process: `last_line(generated, dataset, flag, ...)` is the verdict."""

    def run(generated: Path, dataset: Path, *flags: object) -> str:
        check_copies(parse_args(["--generated", str(generated), "--dataset", str(dataset), *map(str, flags)]))
        run.output = capsys.readouterr().out
        return run.output.splitlines()[-1]

    return run


@pytest.fixture
def training(folder) -> Path:
    return folder("training", {f"{seed}.png": picture(seed) for seed in range(4)})


def test_the_data_sets_own_pictures_are_copies_and_each_of_itself(tmp_path):
    """The script as it is called, with the repository's own pictures."""
    shutil.copytree(DATASET, tmp_path / "generated")
    done = subprocess.run(
        [sys.executable, ROOT / "text_to_image" / "check_copies.py", "--generated", tmp_path / "generated"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    *_, table, last = done.stdout.split("\n\n")[1].splitlines(), done.stdout.splitlines()[-1]
    assert last == "3 of 3 are copies"
    assert [row.split("  ")[-1].strip() for row in table[1:]] == [row.split("  ")[3].strip() for row in table[1:]]


def test_changed_copies_are_counted_and_others_are_not(folder, last_line, training):
    original, moved = picture(2), Image.new("RGB", (168, 216), "white")
    moved.paste(original, (7, -5))
    copies = {
        "mirrored.png": ImageOps.mirror(original),
        "moved.png": moved,
        "recoloured.png": Image.merge("RGB", original.split()[::-1]),
        "darker.png": ImageEnhance.Brightness(original).enhance(0.7),
        "small.png": original.resize((112, 144)),
    }
    others = {f"jeans-{seed}.png": picture(50 + seed) for seed in range(8)}
    others |= {f"garment-{seed}.png": picture(80 + seed, None) for seed in range(8)}
    assert last_line(folder("generated", {**copies, **others}), training) == "5 of 21 are copies"
    assert "0 of 4 would be taken for copies of each other" in last_line.output
    assert "all those of 4 of 4 pictures would be found" in last_line.output
    assert "the count tells little" not in last_line.output
    rows = [line.split() for line in last_line.output.split("\n\n")[1].splitlines()[1:]]
    assert {row[-1] for row in rows if row[1] == "copy"} == set(copies) == {row[-1] for row in rows[:5]}
    assert all(row[2] == "2.png" for row in rows[:5])
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows)


def test_what_an_earlier_model_drew_into_the_same_folder_does_not_count(folder, last_line, training):
    generated = folder("generated", {"a.png": picture(1), "b.png": picture(2), "c.png": picture(9)})
    rows = [{"file_name": f"{name}.png", "model_hash": model} for name, model in (("a", "x"), ("c", "y"), ("b", "y"))]
    (generated / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_line(generated, training) == "1 of 2 are copies"
    assert "left out: 1 drawn by other models" in last_line.output


def test_a_single_training_picture_is_enough(folder, last_line):
    training = folder("training", {"1.png": picture(1)})
    generated = folder("generated", {"copy.png": ImageOps.mirror(picture(1)), "other.png": picture(9)})
    assert last_line(generated, training) == "1 of 2 are copies"
    assert "nearest other" not in last_line.output and "two training pictures" not in last_line.output


def test_the_scale_is_told_and_so_is_a_measure_that_sees_nothing():
    """Known copies 0.1 away: the training pictures must lie clearly farther from each other than that."""
    told = [Scale(np.array([0.1, 0.1]), np.full(2, own)) for own in (0.9, 0.25, 0.15)]
    assert [scale.limit for scale in told] == pytest.approx([0.15, 0.125, 0.1])
    assert [scale.is_blind for scale in told] == [False, False, True]
    assert Scale(np.array([0.1]), np.array([])).limit == pytest.approx(0.15)


def test_of_many_training_pictures_some_give_the_scale_and_all_are_compared(folder, last_line, monkeypatch):
    monkeypatch.setattr("evaluation.copies.COMPARED", 2)  # the first and the last of five
    originals = [picture(seed) for seed in range(5)]
    training = folder("training", {f"{i}.png": original for i, original in enumerate(originals)})
    generated = folder("generated", {"copy.png": ImageOps.mirror(originals[2]), "other.png": picture(60)})
    assert last_line(generated, training) == "1 of 2 are copies"
    assert "measured on 2 of the 5 training pictures" in last_line.output
    assert "0 of 2 would be taken for copies of each other" in last_line.output
    told = float(re.search(r"two training pictures \(2 of them\) are ([\d.]+) apart", last_line.output)[1])
    likeness = StructuralSimilarity()
    pair = (originals[0], originals[4]), (originals[4], originals[0])
    assert told == pytest.approx(np.mean([likeness.distances([one], [other]) for one, other in pair]), abs=2e-3)


def test_the_order_of_pictures_of_several_shapes_is_kept():
    shapes = [(168, 216), (216, 168), (168, 216), (168, 168)]
    pictures = [picture(2).resize(shape) for shape in shapes]
    likeness = StructuralSimilarity()
    alone = np.concatenate([likeness.distances([each], [picture(2), picture(60)]) for each in pictures])
    assert np.array_equal(likeness.distances(pictures, [picture(2), picture(60)]), alone)


def test_training_pictures_that_are_the_same_are_said_to_tell_little(folder, last_line):
    training = folder("training", {f"{i}.png": picture(1) for i in range(3)})
    assert last_line(folder("generated", {"a.png": picture(1)}), training) == "1 of 1 are copies"
    assert "3 of 3 would be taken for copies of each other" in last_line.output
    assert "the count tells little" in last_line.output


def test_known_copies_are_changed_and_have_the_shape_of_the_samples():
    for made in known_copies(picture(3), (96, 96)):
        assert made.size == (96, 96)
        assert StructuralSimilarity().distances([made], [picture(3)])[0, 0] > 0.005


def test_diversity_is_the_mean_distance_of_all_pairs(folder, last_line, training):
    def apart() -> float:
        return float(re.search(r"two generated pictures are ([\d.]+) apart", last_line.output)[1])

    same = folder("same", {f"{i}.png": picture(30) for i in range(3)})
    last_line(same, training)
    assert apart() < 0.005
    unlike = folder("unlike", {f"{i}.png": picture(30 + i, None) for i in range(3)})
    last_line(unlike, training)
    assert apart() > 0.3


def test_sheets_are_no_pictures_and_the_list_of_pictures_is_followed(folder):
    made = {f"{i}.png": Image.new("RGB", (9, 9)) for i in range(3)}
    sheets = {name: Image.new("RGB", (9, 9)) for name in ("contact_sheet.jpg", "example.jpg", "copies_sheet.jpg")}
    generated = folder("generated", {**made, **sheets, "before_after.jpg": Image.new("RGB", (9, 9))})
    assert [path.name for path in generated_pictures(generated)] == ["0.png", "1.png", "2.png"]
    rows = [json.dumps({"file_name": name}) for name in ("2.png", "gone.png", "../0.png")]
    (generated / "images.jsonl").write_text("\n".join(rows) + "\n")
    assert [path.name for path in generated_pictures(generated)] == ["2.png"]


def test_training_pictures_are_those_with_a_caption_else_all(folder):
    dataset = folder("dataset", {f"{i}.png": Image.new("RGB", (9, 9)) for i in range(3)})
    assert len(training_pictures(dataset)) == 3
    (dataset / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "jeans"}\n')
    assert training_pictures(dataset) == [dataset / "1.png"]


def test_the_sheet_lies_beside_the_pictures_and_a_second_check_says_the_same(folder, last_line, training):
    generated = folder("generated", {"a.png": picture(1), "b.png": picture(60)})
    first = last_line(generated, training)
    sheet = Image.open(generated / "copies_sheet.jpg")
    assert sheet.format == "JPEG" and sheet.width > 300
    assert last_line(generated, training) == first == "1 of 2 are copies"
    last_line(generated, training, "--output", generated.parent / "elsewhere.jpg")
    assert (generated.parent / "elsewhere.jpg").is_file()


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_judged(folder, training, capsys):
    generated = folder("generated", {"a.png": picture(1)})
    (generated / "broken.png").write_bytes(b"no picture")
    with pytest.raises(WorkError, match=r"broken\.png: not a picture"):
        check_copies(Namespace(generated=generated, dataset=training, embedder=None, output=None))
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 are copies"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--generated", "nowhere"], "--generated nowhere: no such folder"),
        (["--generated", "empty"], "--generated empty: no pictures"),
        (["--generated", "broken"], "--generated broken: no picture in it can be read"),
        (["--dataset", "empty"], "no pictures in"),
        (["--output", "sheet.png"], "ends in .jpg"),
        (["--output", "nowhere/sheet.jpg"], "no folder nowhere"),
        (["--generated", "training"], "is the data set itself"),
        (["--embedder", "empty"], "--embedder empty: not a vision model"),
    ],
)
def test_wrong_input_is_refused_by_name(monkeypatch, folder, training, flags, named):
    monkeypatch.chdir(training.parent)
    folder("generated", {"a.png": picture(1)})
    folder("empty", {})
    (folder("broken", {}) / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=named) as caught:
        check_copies(parse_args(["--generated", "generated", "--dataset", "training", *flags]))
    assert "\n" not in str(caught.value)


def test_the_defaults_are_this_repositorys_own_folders():
    args = parse_args([])
    assert (args.generated, args.dataset) == (ROOT / "Generated_sample", DATASET)
