"""Captioning a folder: what is captioned, written, reported and refused; all in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning import caption_folder
from captioning.caption_file import locate_caption_file
from captioning.caption_writers import CaptionWriter
from img_captioning import caption_or_check, parse_args
from metadata.files import MetadataFile
from metadata.image_files import METADATA
from metadata.reading import read_captions
from metadata.writer import append_captions
from runtime.errors import UserError, WorkError
from runtime.locking import this_process
from tiny_captioners import make_blip, make_qwen


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("models") / "says blue", "blue")


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 4):
        write_picture(tmp_path / f"11 ({number}).JPG", number)
    return tmp_path


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    kind = {".PNG": "PNG", ".webp": "WEBP"}.get(path.suffix, "JPEG")
    Image.fromarray(blocks).resize((260, 390), Image.Resampling.NEAREST).save(path, kind)


@pytest.fixture
def caption(folder, captioner):
    def run(*flags: object, model: Path = captioner) -> None:
        usual = ["--image_dir", folder, "--model", model, "--max_new_tokens", 2]
        caption_or_check(parse_args([str(word) for word in [*usual, *flags]]))

    return run


def captions_of(folder: Path, column: str = "text") -> dict[str, str]:
    return {row.file_name: row.captions[0] for row in read_captions(folder, column)}


def test_captions_are_written_printed_and_counted_and_the_data_is_checked(folder, caption, capsys):
    partial = folder / f".{METADATA}.host.1.part"
    partial.write_text("half a fi")
    caption()
    assert not partial.exists()
    assert captions_of(folder) == {f"11 ({number}).JPG": "blue blue" for number in (1, 2, 3)}
    said = capsys.readouterr()
    assert "captioning 3 of 3 pictures" in said.out and "11 (2).JPG: blue blue" in said.out
    assert "tokens of 3 captions: " in said.out and "3 in 1 chunk" in said.out
    assert "starter/base" in said.out  # whose tokenizer counted
    assert "equal captions: 1" in said.out and "nearly" not in said.out
    assert "picture/s" in said.err and "3/3" in said.err  # the bar: how many, how fast


def test_a_trigger_stands_before_each_caption_once_and_captions_are_cut_to_words(folder, caption):
    append_captions(folder, [("11 (1).JPG", "mine")])
    caption("--trigger", "sks jeans", "--max_words", 1)
    assert list(captions_of(folder).values()) == ["mine", "sks jeans, blue", "sks jeans, blue"]
    (folder / METADATA).unlink()
    caption("--trigger", "blue")
    assert set(captions_of(folder).values()) == {"blue blue"}


def test_a_limit_counts_pictures_of_this_run_and_the_same_command_goes_on(folder, caption, capsys):
    for done in (1, 2, 3):
        caption("--limit", 1)
        assert len(captions_of(folder)) == done
        assert f"captioning 1 of 3 pictures in {folder}" in capsys.readouterr().out
    caption("--limit", 1)
    assert "all 3 pictures" in capsys.readouterr().out


def test_a_limit_does_not_count_pictures_that_cannot_be_read(folder, caption):
    for number in range(3):
        (folder / f"1 ({number}).png").write_text("no picture")  # before all others
    for done in (1, 2):
        with pytest.raises(WorkError, match="3 pictures without a caption"):
            caption("--limit", 1)
        assert len(captions_of(folder)) == done


def test_where_every_picture_has_a_row_empty_captions_are_counted_and_lengths_printed(folder, caption, capsys):
    append_captions(folder, [("11 (1).JPG", ""), ("11 (2).JPG", "mine"), ("11 (3).JPG", "mine too")])
    caption()
    said = capsys.readouterr().out
    assert f"all 3 pictures in {folder} have a row; 1 caption is empty" in said
    assert "tokens of 2 captions: " in said and "starter/base" in said


def test_rows_of_missing_pictures_are_reported_and_kept(folder, caption, capsys):
    before = b'{"file_name": "gone.JPG", "text": "mine", "tags": [1]}\n{"file_name": "11 (1).JPG", "text": ""}'
    (folder / METADATA).write_bytes(before)
    caption()
    assert (folder / METADATA).read_bytes().startswith(before + b"\n{")
    said = capsys.readouterr().out
    assert 'line 1: the picture "gone.JPG" is missing' in said and "line 2: `text` is empty" in said
    caption()  # nothing is left to do, and it is reported again
    assert 'line 1: the picture "gone.JPG" is missing' in capsys.readouterr().out


def test_replacing_captions_all_pictures_in_place_and_resumes_after_a_limit(folder, caption, capsys):
    rows = '{"n": 1, "file_name": "11 (2).JPG", "text": "mine"}\n{"file_name": "gone.JPG", "text": "kept"}\n'
    (folder / METADATA).write_text(rows)
    caption("--existing", "replace", "--limit", 2)
    half = (folder / METADATA).read_text()
    assert half.splitlines()[:2] == rows.replace('"mine"', '"blue blue"').splitlines()
    assert half.count("11 (") == 2  # 11 (1) got a row
    caption("--existing", "replace")
    said = capsys.readouterr().out
    assert "resuming an interrupted replacement: 2 pictures done already" in said
    assert said.count("JPG: blue blue") == 3
    assert (folder / METADATA).read_text().count("blue blue") == 3
    assert (folder / f"{METADATA}.backup-1").read_text() == rows
    assert sorted(path.name for path in folder.glob("*metadata*")) == [METADATA, f"{METADATA}.backup-1"]
    caption("--existing", "replace")  # a finished one begins anew
    assert len(list(folder.glob("*.backup-*"))) == 2


def test_a_replacement_is_over_when_all_have_been_tried_also_with_unreadable_pictures(folder, caption):
    (folder / "note.png").write_text("no picture")
    with pytest.raises(WorkError, match="1 picture without"):
        caption("--existing", "replace")
    assert [path.name for path in folder.glob("*metadata*")] == [METADATA]
    caption("--existing", "replace", "--limit", 1)
    assert (folder / f".{METADATA}.replacing").exists()


def test_unreadable_pictures_are_named_skipped_and_counted(folder, caption, capsys):
    whole = (folder / "11 (1).JPG").read_bytes()
    (folder / "11 (1).JPG").write_bytes(whole[: len(whole) // 2])
    (folder / "note.png").write_text("no picture")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)
    with pytest.raises(WorkError, match="^3 pictures without a caption:") as caught:
        caption("--batch_size", 1)
    assert "11 (1).JPG: damaged" in str(caught.value) and "note.png: not a picture" in str(caught.value)
    assert "its name is not UTF-8" in str(caught.value)
    assert list(captions_of(folder)) == ["11 (2).JPG", "11 (3).JPG"]
    said = capsys.readouterr()  # while it runs, too
    assert "11 (1).JPG: damaged" in said.err and "note.png: not a picture" in said.err


def test_unreadable_pictures_are_named_also_when_the_data_cannot_be_checked(folder, caption, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("cannot look")

    monkeypatch.setattr(caption_folder, "print_lengths", fail)
    (folder / "note.png").write_text("no picture")
    with pytest.raises(WorkError, match="note.png"):
        caption()
    assert "the data could not be checked: cannot look" in capsys.readouterr().err


def test_a_picture_that_the_model_refuses_is_named_and_the_others_of_its_batch_are_captioned(
    folder, caption, tmp_path_factory
):
    Image.new("RGB", (4, 1200)).save(folder / "11 (2).png")  # Qwen's limit is 200 times as high as wide
    qwen = make_qwen(tmp_path_factory.mktemp("models") / "qwen")
    with pytest.raises(WorkError, match=r"11 \(2\).png: .*aspect ratio"):
        caption("--max_new_tokens", 8, model=qwen)
    described = captions_of(folder)
    assert {"11 (2).JPG", "11 (3).JPG"} <= set(described)  # of the first its random weights may find nothing to say
    assert "11 (2).png" not in described and len(set(described.values())) == len(described)


class SaysWhatItSees:
    """A captioner whose captions name the picture's size and colour."""

    def caption(self, images):
        return [f"{image.width} x {image.height}, {image.getpixel((5, 5))}" for image in images]


def test_each_caption_stands_in_the_row_of_its_own_picture(tmp_path, tmp_path_factory):
    import datasets

    for number in range(20):
        colour = (10 * number, 255 - 10 * number, 40)
        Image.new("RGB", (300 + number, 260), colour).save(tmp_path / f"{number}.png")
    for number in (3, 11, 12):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes()[:200])
    (tmp_path / "5 of mine.png").write_bytes((tmp_path / "5.png").read_bytes())
    append_captions(tmp_path, [("5 of mine.png", "mine")])
    args = parse_args(["--image_dir", str(tmp_path), "--batch_size", "8"])
    writer = CaptionWriter(locate_caption_file(tmp_path, None, False))
    failures = caption_folder.caption_pending(args, writer, SaysWhatItSees(), "a stub")
    assert [line.partition(":")[0] for line in failures] == ["3.png", "11.png", "12.png"]
    captions = captions_of(tmp_path)
    assert captions.pop("5 of mine.png") == "mine" and len(captions) == 17
    for name, text in captions.items():
        with Image.open(tmp_path / name) as image:
            assert text == SaysWhatItSees().caption([image])[0]
    cache = str(tmp_path_factory.mktemp("cache"))
    split = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=cache)
    texts = [row["text"] == SaysWhatItSees().caption([row["image"]])[0] for row in split if row["text"] != "mine"]
    assert len(texts) == 17 and all(texts)


def test_a_model_that_finds_no_words_writes_no_empty_caption(folder, caption, tmp_path_factory):
    silent = make_blip(tmp_path_factory.mktemp("models") / "silent", "[SEP]")
    with pytest.raises(WorkError, match="11 \\(1\\).JPG: the model found no words for it"):
        caption("--trigger", "sks", model=silent)
    assert not (folder / METADATA).exists()


def test_another_file_is_written_and_the_folders_own_left_alone(folder, caption, capsys, tmp_path_factory):
    append_captions(folder, [("11 (1).JPG", "mine")])
    before, output = (folder / METADATA).read_bytes(), tmp_path_factory.mktemp("out") / "new" / "captions.jsonl"
    caption("--output", output)
    assert len(output.read_text().splitlines()) == 3 and (folder / METADATA).read_bytes() == before
    assert json.loads(output.read_text().splitlines()[0])["file_name"] == "11 (1).JPG"
    flags = capsys.readouterr().out.splitlines()[-1].partition("--dataset ")[2].split(" --metadata_file ")
    assert flags == [str(folder), str(output)]
    assert len(read_captions(folder, files=[MetadataFile(output, folder)])) == 3


def test_a_folder_that_cannot_be_written_is_one_line_before_the_model_is_loaded(caption):
    with pytest.raises(WorkError, match="/proc/.captions.jsonl.lock: cannot be made"):
        caption("--output", "/proc/captions.jsonl", model="/no such model")


def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(folder, caption):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
    lock = folder / f".{METADATA}.lock"
    lock.write_text(json.dumps({**this_process(), "pid": other.pid, "started": started}))
    with pytest.raises(UserError, match=f"process {other.pid} on this host writes captions into {METADATA}; wait"):
        caption()
    assert not (folder / METADATA).exists()
    other.kill()
    other.wait()
    caption()
    assert len(captions_of(folder)) == 3 and not lock.exists()


def test_a_malformed_row_is_refused_by_its_line_and_nothing_is_changed(folder, caption):
    (folder / METADATA).write_bytes(b'{"file_name": "11 (1).JPG", "text": "mine"}\n{"file_na')
    for flags in ([], ["--existing", "replace"], ["--check"]):
        with pytest.raises(UserError, match="metadata.jsonl, line 2: not JSON"):
            caption(*flags)
    assert (folder / METADATA).read_bytes().endswith(b"file_na")
    assert sorted(path.name for path in folder.glob("*metadata*")) == [METADATA]


def test_datasets_reads_what_was_written(folder, caption, tmp_path_factory):
    import datasets

    names = ["11 (1).JPG", "11 (2).JPG", "11 (3).JPG", "a b/é ü.JPG", "[x] (1)/pic[2].PNG", "日本/写真.webp"]
    for number, name in enumerate(names[3:]):
        write_picture(folder / name, 10 + number)
    caption("--recursive")
    assert sorted(captions_of(folder)) == sorted(names)
    cache = str(tmp_path_factory.mktemp("cache"))
    split = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=cache)
    assert len(split) == len(names) and set(split["text"]) == {"blue blue"}
    pixels = sorted(np.asarray(row["image"].convert("RGB")).tobytes() for row in split)
    assert pixels == sorted(np.asarray(Image.open(folder / name).convert("RGB")).tobytes() for name in names)
