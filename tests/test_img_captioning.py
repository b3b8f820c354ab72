"""img_captioning.py as a process: its exit codes, what it loads and refuses, and what a kill leaves behind."""

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from background import Background, run_script
from img_captioning import caption_or_check, parse_args
from metadata.reading import read_captions
from metadata.writer import append_captions
from packed_data import write_shard
from runtime.errors import UserError
from tiny_captioners import make_blip

SCRIPT = Path(__file__).resolve().parents[1] / "text_to_image" / "img_captioning.py"
MANY = 26


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("models") / "says blue", "blue")


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path, 3)


def write_pictures(folder: Path, number: int) -> Path:
    for one in range(1, number + 1):
        Image.new("RGB", (40, 60), (10, 20, 3 * one)).save(folder / f"11 ({one}).JPG")
    return folder


def test_tar_shards_and_parquet_files_are_not_captioned(tmp_path):
    write_shard(tmp_path / "shards" / "0.tar", [("1.jpg", b"-")])
    for name in ("shards", "shards/0.tar", "shards/*.tar"):
        for check in ([], ["--check"]):
            with pytest.raises(UserError, match=r"0\.tar: its captions are in it"):
                caption_or_check(parse_args(["--image_dir", str(tmp_path / name), *check]))
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["0.tar"]


def run(*flags: object) -> subprocess.CompletedProcess:
    return run_script(SCRIPT, *flags)


def test_pictures_get_a_row_and_those_that_cannot_be_read_are_named_when_the_rest_is_done(pictures, captioner):
    before = b'{ "file_name":"11 (2).JPG","text":"mine" }'
    (pictures / "metadata.jsonl").write_bytes(before)
    (pictures / "note.png").write_text("no picture")
    done = run("--image_dir", pictures, "--model", captioner, "--batch_size", 1, "--max_new_tokens", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "error: 1 picture without a caption:\n  note.png" in done.stderr
    assert (pictures / "metadata.jsonl").read_bytes().startswith(before)
    assert [(row.file_name, row.captions) for row in read_captions(pictures)] == [
        ("11 (2).JPG", ("mine",)),
        ("11 (1).JPG", ("blue blue",)),
        ("11 (3).JPG", ("blue blue",)),
    ]


def test_a_look_at_the_data_loads_no_model_and_ends_in_exit_code_1_where_something_is_wrong(pictures):
    done = run("--image_dir", pictures, "--check", "--model", "no/such-captioner")
    assert done.returncode == 1 and "pictures without a row: 3" in done.stdout and "tiny" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_pictures_that_are_links_out_of_the_folder_are_refused_before_a_captioner_is_loaded(pictures, tmp_path):
    elsewhere = tmp_path / "links"
    elsewhere.mkdir()
    for path in pictures.glob("*.JPG"):
        (elsewhere / path.name).symlink_to(path)
    with pytest.raises(UserError, match="3 pictures are links"):
        caption_or_check(parse_args(["--image_dir", str(elsewhere), "--model", "no/such-captioner"]))
    other_tools = ["--output", str(tmp_path / "other.jsonl")]
    with pytest.raises(UserError, match="no/such-captioner"):
        caption_or_check(parse_args(["--image_dir", str(elsewhere), "--model", "no/such-captioner", *other_tools]))


def test_rows_of_pictures_below_are_enough(tmp_path, capsys):
    (tmp_path / "below").mkdir()
    Image.new("RGB", (300, 300), "navy").save(tmp_path / "below" / "1.jpg")
    with pytest.raises(UserError, match="--recursive"):
        caption_or_check(parse_args(["--image_dir", str(tmp_path)]))
    append_captions(tmp_path, [("below/1.jpg", "mine")])
    caption_or_check(parse_args(["--image_dir", str(tmp_path)]))
    assert "no pictures directly in" in capsys.readouterr().out


def test_no_captioner_is_loaded_when_every_picture_has_a_caption(pictures):
    append_captions(pictures, [(f"11 ({number}).JPG", "mine") for number in range(1, 4)])
    done = run("--image_dir", pictures, "--model", "no/such-captioner")
    assert done.returncode == 0 and "all 3 pictures" in done.stdout
    assert "equal captions" in done.stdout  # the look at the data is taken all the same


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--batch_size", "0"], "--batch_size"),
        (["--max_new_tokens", "some"], "--max_new_tokens"),
        (["--limit", "0"], "--limit"),
        (["--existing", "burn"], "--existing"),
        (["--image_dir", "/no such folder"], "no data set folder /no such folder"),
        (["--output", "/tmp"], "--output /tmp"),
        (["--imagedir", "x"], "--imagedir"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(pictures, flags, complaint):
    done = run("--image_dir", pictures, *flags)
    assert done.returncode == 2
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_model_that_cannot_be_had_is_one_line_that_says_what_to_do(pictures):
    done = run("--image_dir", pictures, "--model", "no/such-captioner")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--model no/such-captioner" in done.stderr and "hf download no/such-captioner" in done.stderr
    assert sorted(path.suffix for path in pictures.iterdir()) == [".JPG"] * 3


def test_a_bad_row_or_an_empty_folder_is_refused(pictures, tmp_path_factory):
    (pictures / "metadata.jsonl").write_text("\n{")
    assert "metadata.jsonl, line 2" in run("--image_dir", pictures).stderr
    empty = tmp_path_factory.mktemp("empty")
    done = run("--image_dir", empty)
    assert done.returncode == 2 and str(empty) in done.stderr


# --- several at once, and signals -----------------------------------------------------------------------------------


def in_background(folder: Path, log: Path, *flags: object) -> Background:
    return Background(log, "--image_dir", folder, *flags, script=SCRIPT)


@pytest.mark.multiprocess
def test_a_second_run_waits_for_the_first_where_it_is_asked_to(tmp_path, captioner):
    folder, logs = tmp_path / "pictures", [tmp_path / "first.txt", tmp_path / "second.txt"]
    folder.mkdir()
    write_pictures(folder, number := 10)
    flags = ["--model", captioner, "--batch_size", 1]
    first = in_background(folder, logs[0], *flags)
    first.until(lambda: captioned(logs[0].read_text().splitlines())).send(signal.SIGSTOP)
    second = in_background(folder, logs[1], *flags, "--wait")
    second.until(lambda: "waiting for another run: " in logs[1].read_text())
    first.send(signal.SIGCONT)
    assert (first.ended(), second.ended()) == (0, 0), logs[1].read_text()
    said = logs[1].read_text()
    assert f"process {first.pid} on this host" in said
    assert f"all {number} pictures in {folder} have a row" in said and not captioned(said.splitlines())
    assert len(captioned(logs[0].read_text().splitlines())) == number == len(read_captions(folder))


@pytest.mark.multiprocess
def test_a_signal_ends_it_with_all_captions_written_and_the_same_command_goes_on(tmp_path, captioner):
    numbers = (signal.SIGUSR1, signal.SIGINT)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: stop(tmp_path / number.name, captioner, number), numbers))
    folder = tmp_path / "SIGINT"
    caption_or_check(parse_args(["--image_dir", str(folder), "--model", str(captioner), "--max_new_tokens", "1"]))
    assert len(read_captions(folder)) == MANY


def stop(folder: Path, captioner: Path, number: signal.Signals) -> None:
    folder.mkdir()
    write_pictures(folder, MANY)
    log = folder.with_suffix(".txt")
    run = in_background(folder, log, "--model", captioner, "--batch_size", 2)
    run.until(lambda: len(captioned(log.read_text().splitlines())) >= 4).send(number)
    assert run.ended() == 75, log.read_text()
    said = log.read_text()
    names = [row.file_name for row in read_captions(folder)]
    assert captioned(said.splitlines()) == names and 4 <= len(names) < MANY
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(number.name) and str(len(names)) in said.splitlines()[-1]
    assert {path.name for path in folder.iterdir() if path.suffix != ".JPG"} == {"metadata.jsonl"}


# --- kills ----------------------------------------------------------------------------------------------------------


def start(flags: list[object]) -> subprocess.Popen:
    """Its output is a pipe of one page, some 13 lines, so that it stands still in mid-run when nobody reads."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, flags)], stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    process.stdout = os.fdopen(read, "rb", buffering=0)
    return process


def captioned(lines: list[str]) -> list[str]:
    return [line.partition(": ")[0] for line in lines if line.startswith("11 (")]


@pytest.mark.multiprocess
def test_the_same_command_goes_on_after_kill_9_and_captions_no_picture_twice(tmp_path, captioner):
    with ThreadPoolExecutor() as pool:  # both at a time: starting the script takes seconds
        list(pool.map(lambda existing: kill_and_go_on(tmp_path / existing, captioner, existing), ("keep", "replace")))


def kill_and_go_on(folder: Path, captioner: Path, existing: str) -> None:
    folder.mkdir()
    write_pictures(folder, MANY)
    names = [f"11 ({number}).JPG" for number in range(1, MANY + 1)]
    mine = names if existing == "replace" else names[:2]
    append_captions(folder, [(name, "mine") for name in mine])
    before = (folder / "metadata.jsonl").read_bytes()
    flags = ["--image_dir", folder, "--model", captioner, "--batch_size", 1, "--existing", existing]

    process, lines = start(flags), []
    while len(captioned(lines)) < 5:
        lines.append(process.stdout.readline().decode())
        assert lines[-1], "it ended early"
    with pytest.raises(UserError, match=f"process {process.pid} on this host"):
        caption_or_check(parse_args([str(word) for word in flags]))
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().decode().splitlines()
    assert process.wait() == -signal.SIGKILL

    rows = {row.file_name: row.captions[0] for row in read_captions(folder)}  # raises where the file is not valid
    assert all(rows[name] != "mine" for name in captioned(lines))  # what was printed is in the file
    first = [name for name, text in rows.items() if text != "mine"]
    to_do = set(names) if existing == "replace" else set(names[2:])
    assert 5 <= len(first) < len(to_do) and set(captioned(lines)) <= set(first)
    assert (folder / ".metadata.jsonl.lock").exists()

    again = run(*flags)
    assert again.returncode == 0, again.stderr
    second = captioned(again.stdout.splitlines())
    assert len(second) == len(set(second)) and {*first, *second} == to_do
    assert len(set(first) & set(second)) <= (existing == "replace")  # one that is written and not yet noted
    after = (folder / "metadata.jsonl").read_bytes()
    assert [row.file_name for row in read_captions(folder)] == names
    if existing == "keep":
        assert after.startswith(before)
    else:
        assert b"mine" not in after and (folder / "metadata.jsonl.backup-1").read_bytes() == before
    kept = {"metadata.jsonl"} | ({"metadata.jsonl.backup-1"} if existing == "replace" else set())
    assert {path.name for path in folder.iterdir()} == {*names, *kept}
