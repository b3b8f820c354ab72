"""inference.py that is killed, stopped, shared by processes or short of memory: no image is lost, none is half."""

import re
import signal
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from PIL import Image

from background import INFERENCE, Background, finish, start
from generated_folder import QUICK, pixels, rows
from generation.image_generator import ImageGenerator
from runtime.errors import WorkError


def test_resume_fills_the_gaps_alone(images_of, finished_run, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 4]
    paths = images_of(*usual)
    before = [(pixels(path), path.stat().st_mtime_ns) for path in paths]
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-100])  # cut short by something else
    (tmp_path / "pictures" / "images.jsonl").unlink()
    assert images_of(*usual, "--resume") == paths
    for index, (path, (old, written)) in enumerate(zip(paths, before, strict=True)):
        assert np.abs(pixels(path) - old).max() <= 1
        assert (path.stat().st_mtime_ns == written) == (index in (0, 3))


@pytest.mark.multiprocess
def test_after_kill_9_no_half_picture_is_left_and_resume_generates_the_rest(images_of, finished_run, tmp_path):
    flags = ["--prompt", "jeans", "--num_images", 12, "--batch_size", 1, *QUICK]
    whole = images_of(*flags)
    there, log = tmp_path / "killed", tmp_path / "log"
    words = ["--model", finished_run, "--output_dir", there, *flags]
    run = Background(log, *words, script=INFERENCE).until(lambda: len(list(there.glob("*.png"))) >= 2)
    assert run.kill().ended() == -signal.SIGKILL
    left = list(there.glob("*.png"))
    assert 2 <= len(left) < 12 and all(Image.open(path).load() for path in left)
    finish([Background(log, *words, "--resume", script=INFERENCE)])
    assert f"{len(left)} of them" in log.read_text()
    assert not list(there.glob(".*.part")) and len(rows(there)) == 12
    for path in whole:
        assert np.abs(pixels(path) - pixels(there / path.name)).max() <= 1


@pytest.mark.multiprocess
def test_a_signal_keeps_what_is_generated_and_says_how_to_go_on(finished_run, tmp_path):
    there, log = tmp_path / "stopped", tmp_path / "log"
    words = [
        "--model",
        finished_run,
        "--output_dir",
        there,
        "--prompt",
        "jeans",
        "--num_images",
        400,
        "--batch_size",
        1,
    ]
    run = Background(log, *words, *QUICK, script=INFERENCE).until(lambda: len(list(there.glob("*.png"))) >= 3)
    assert run.send(signal.SIGINT).ended() == 75
    said = log.read_text().splitlines()[-1]
    generated = list(there.glob("*.png"))
    assert said.startswith("SIGINT: stopped after") and "--resume" in said and "Traceback" not in log.read_text()
    assert 3 <= len(generated) < 400 and {row["file_name"] for row in rows(there)} == {path.name for path in generated}


@pytest.mark.multiprocess
def test_two_processes_share_the_list(images_of, finished_run, tmp_path):
    flags = ["--prompt", "jeans", "--prompt", "the white", "--num_images", 3, "--batch_size", 2, *QUICK]
    alone = images_of(*flags)
    there, log = tmp_path / "shared", tmp_path / "log"
    run = start(log, 2, "--model", finished_run, "--output_dir", there, *flags, script=INFERENCE)
    finish(run)
    assert sorted(path.name for path in there.glob("*.png")) == sorted(path.name for path in alone)
    assert [row["file_name"] for row in rows(there)] == [path.name for path in alone]
    for path in alone:
        assert np.abs(pixels(path) - pixels(there / path.name)).max() <= 1
    assert "6 pictures in" in log.read_text() and "pictures in" not in run[1].log.read_text()
    assert "3/3" in log.read_text()  # its half of them


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_the_pictures_are_the_same(images_of, monkeypatch, capsys, error):
    """It fails in the second of three steps, when the sampler has begun to remember."""
    usual, step = ["--prompt", "jeans", "--num_images", 5], DPMSolverMultistepScheduler.step
    expected = images_of(*usual)

    def small(self, model_output, t, sample, **more):
        if len(sample) > 1 and self.step_index == 1:
            raise error
        return step(self, model_output, t, sample, **more)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", small)
    generated = images_of(*usual, folder="less")
    said = capsys.readouterr().out
    assert re.findall(r"(\d) pictures at once.* (\d)\b", said) == [("4", "2"), ("2", "1")]
    for one, other in zip(generated, expected, strict=True):
        assert one.name == other.name and np.abs(pixels(one) - pixels(other)).max() <= 1


def test_one_picture_that_is_too_large_to_decode_at_once_is_decoded_in_tiles(images_of, monkeypatch, capsys):
    decode = AutoencoderKL._decode

    def small(vae, z, return_dict=True):
        if max(z.shape[2:]) > 16 and not vae.use_tiling:
            raise RuntimeError("CUDA out of memory")
        return decode(vae, z, return_dict)

    monkeypatch.setattr(AutoencoderKL, "_decode", small)
    monkeypatch.setattr("models.sampling.TILE", 32)
    assert len(images_of("--prompt", "jeans", "--num_images", 2)) == 2
    assert capsys.readouterr().out.count("in tiles") == 1
    monkeypatch.setattr("models.sampling.TILE", 512)  # which makes no tiles of it
    with pytest.raises(WorkError, match="--width"):
        images_of("--prompt", "jeans", "--num_images", 1)


def test_one_picture_that_does_not_fit_is_a_line(images_of, monkeypatch):
    def never(self, batch):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(ImageGenerator, "generate_images", never)
    with pytest.raises(WorkError, match="56 x 72 px.*--width"):
        images_of("--prompt", "jeans", "--num_images", 2)


def test_a_full_disk_is_reported_and_not_taken_for_done(images_of, monkeypatch, tmp_path):
    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(WorkError, match="No space left"):
        images_of("--prompt", "jeans", "--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))
