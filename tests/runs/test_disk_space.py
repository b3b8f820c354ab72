"""A disk that is full, or will be: the last good checkpoint stays, one line tells, and the run goes on later."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from background import Background
from captioned_folder import write_captioned_folder
from run_folder import losses, rows
from runs import disk_space
from runs.disk_space import DiskSpace, check_space
from runtime.errors import WorkError

USUAL = ["--learning_rate", 1e-3, "--checkpointing_steps", 2, "--seed", 0]


@pytest.mark.multiprocess
def test_a_disk_that_fills_up_ends_the_run_with_1_and_it_goes_on_when_there_is_room(
    train_run, tiny_model, captioned_folder, small_disk, tmp_path
):
    whole = train_run("whole", "--max_train_steps", 8, *USUAL)
    log, out, ballast = tmp_path / "log", small_disk / "out", small_disk / "ballast"
    flags = ["--pretrained_model_name_or_path", tiny_model, "--dataset", captioned_folder, "--output_dir", out]
    flags += ["--max_train_steps", 8, *USUAL, "--checkpoints_total_limit", 2]
    run = Background(log, *flags).until((out / "checkpoint-2" / "manifest.json").is_file)
    _fill(ballast)
    assert run.ended() == 1, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said and "error: " in said and "make room" in said.lower()
    assert (out / "checkpoint-2" / "manifest.json").is_file() and not list(out.glob(".partial-*"))
    ballast.unlink()
    assert Background(log, *flags).ended() == 0, log.read_text()
    assert losses(out) == losses(whole) and [row["step"] for row in rows(out)] == list(range(1, 9))


def _fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def test_a_run_that_will_not_fit_is_refused_before_it_writes_anything(train_run, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WorkError, match=r"will write .* GB .*, 1e-06 GB are free.*--checkpoints_total_limit"):
        train_run("out", "--max_train_steps", 4, *USUAL)
    assert not (tmp_path / "out").exists()


def test_what_is_needed_is_free_or_the_run_is_refused():
    check_space(DiskSpace(checkpoint=10, kept=2, needed=40, free=40), Path("out"))
    with pytest.raises(WorkError):
        check_space(DiskSpace(checkpoint=10, kept=2, needed=41, free=40), Path("out"))


def test_a_file_larger_than_ulimit_f_is_refused_before_the_run(train_run, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space.resource, "getrlimit", lambda _: (100_000, -1))
    with pytest.raises(WorkError, match=r"file of \d+ kB.*ulimit -f.*100 kB"):
        train_run("out", "--max_train_steps", 4, *USUAL)
    assert not (tmp_path / "out").exists()
    check_space(DiskSpace(checkpoint=10, kept=1, needed=20, free=20, largest_file=99_000), Path("out"))


def test_the_largest_file_is_no_smaller_than_any_that_a_run_writes(train_run, monkeypatch):
    spaces, real = [], disk_space.measure_space
    monkeypatch.setattr("training.setup.measure_space", lambda *of: spaces.append(real(*of)) or spaces[-1])
    out = train_run("out", "--max_train_steps", 2, *USUAL, "--use_ema")
    written = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert spaces[0].largest_file == pytest.approx(written, rel=0.3)


def test_the_estimate_of_the_captions_is_what_they_take(train_run, tmp_path, monkeypatch):
    estimates, real = [], disk_space.texts_bytes
    monkeypatch.setattr("training.setup.texts_bytes", lambda *of: estimates.append(real(*of)) or estimates[-1])
    out = train_run("out", "--max_train_steps", 1)
    taken = sum(path.stat().st_size for path in (out / "cache" / "captions").iterdir())
    assert estimates[0] == pytest.approx(taken, rel=0.2)

    write_captioned_folder(tmp_path / "alike", {f"{i}.jpg": "denim jeans" for i in range(4)})
    train_run("alike", "--max_train_steps", 1, dataset=tmp_path / "alike")
    assert estimates[1] * 3 < estimates[0]  # one file for all of them


def test_the_estimate_of_a_checkpoint_is_what_it_takes(train_run, capsys):
    for flags in ([], ["--use_ema"]):
        name = f"out{len(flags)}"
        out = train_run(name, "--max_train_steps", 2, *USUAL, *flags)
        taken = sum(path.stat().st_size for path in (out / "checkpoint-2").rglob("*") if path.is_file())
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("output")]
        estimate = float(line.split("of about ")[1].split(" GB")[0]) * 1e9
        assert estimate == pytest.approx(taken, rel=0.3)  # of a tiny model a good part is not weights
