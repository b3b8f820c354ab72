"""The scripts as a newcomer meets them: their help, wrong flags, a missing environment."""

import os
import shutil
import subprocess
import sys

import pytest

from clone import ROOT

SCRIPTS = ("img_captioning", "train_text_to_image", "inference")
TOOLS = ("export_checkpoint", "check_copies")


def python(*arguments: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **settings)


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(script: str) -> str:
    return python(ROOT / "text_to_image" / f"{script}.py", "--help", env={**os.environ, "COLUMNS": "80"}).stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_fits_80_columns_and_says_how_to_begin(script):
    text = help_of(script)
    assert max(map(len, text.splitlines())) <= 80
    assert f"python text_to_image/{script}.py" in text


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_and_wrong_flags_are_answered_before_a_heavy_library_is_imported(script):
    """What makes `--help` answer at once: PyTorch alone takes seconds."""
    for flag in ("--help", "--no_such_flag"):
        done = python("-X", "importtime", ROOT / "text_to_image" / f"{script}.py", flag)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "runtime.flags" in imported and not imported & {"torch", "numpy", "PIL", "diffusers", "transformers"}


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_a_misspelt_flag_is_refused_in_one_line(script):
    done = python(ROOT / "text_to_image" / f"{script}.py", "--no_such_flag")
    assert done.returncode == 2
    assert "--no_such_flag" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_outside_the_environment_the_line_that_helps_is_printed(script, tmp_path):
    shutil.copytree(ROOT / "text_to_image", tmp_path / "scripts", ignore=shutil.ignore_patterns("starter", "*.txt"))
    (tmp_path / "scripts" / "starter" / "base").mkdir(parents=True)
    (tmp_path / "scripts" / "starter" / "captioner").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.png").write_bytes(b"a picture")
    needed = {
        "img_captioning": ["--image_dir", tmp_path / "data"],
        "train_text_to_image": ["--dataset", tmp_path / "data"],
        "inference": ["--prompt", "x"],
        "export_checkpoint": ["--model", tmp_path, "--to", tmp_path / "model.safetensors"],
        "check_copies": [],
    }
    # -S leaves out the environment's site-packages.
    done = python("-S", tmp_path / "scripts" / f"{script}.py", *needed[script])
    assert done.returncode == 2
    assert "torch" in done.stderr and "bash job.sh setup" in done.stderr and len(done.stderr.splitlines()) == 1
