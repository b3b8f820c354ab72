"""The repository as a whole: its style, its layout and its scripts' help."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clone import ROOT, repository_files

SCRIPTS = ("img_captioning", "train_text_to_image", "inference")
TOOLS = ("export_checkpoint", "check_copies")
TOP = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "job.sh", "dataset", "Generated_sample",
       "text_to_image", "tests"}  # fmt: skip
MEGABYTE = 1 << 20


def python(*arguments: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **settings)


# --- style and layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["check", "--output-format=concise"], ["format", "--check"]], ids=["check", "format"]
)
def test_ruff_finds_nothing(command):
    done = python("-m", "ruff", *command, ".", cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]


def test_nothing_else_is_at_the_top():
    top = {path.parts[0] for path in repository_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_no_room_hides_a_library():
    rooms = {path.stem for path in (ROOT / "text_to_image").glob("*.py")}
    libraries = {"datasets", "diffusers", "transformers", "accelerate", "torch", "tokenizers", "peft", "PIL", "numpy"}
    assert not rooms & (libraries | sys.stdlib_module_names)
    assert not rooms & {"utils", "helpers", "common"}


def test_each_python_file_opens_with_a_sentence():
    for path in repository_files():
        if path.suffix == ".py":
            docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
            assert re.match(r".+?[.!?:](\s|$)", docstring, re.DOTALL), f"{path} does not say what it is for"


def test_no_file_is_large_and_none_holds_a_secret_or_a_home_folder():
    for path in repository_files():
        content = (ROOT / path).read_bytes()
        assert len(content) <= 20 * MEGABYTE, f"{path} is too large for a repository"
        found = re.search(rb"hf_[A-Za-z0-9]{30,}|/(?:root|home/(?!user/)[a-z]+)/|^<<<<<<< ", content, re.MULTILINE)
        assert path == Path(__file__).relative_to(ROOT) or not found or b"\0" in content, f"{path}: {found}"


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(script: str) -> str:
    return python(ROOT / "text_to_image" / f"{script}.py", "--help", env={**os.environ, "COLUMNS": "80"}).stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_fits_80_columns_and_says_how_to_begin(script):
    text = help_of(script)
    assert max(map(len, text.splitlines())) <= 80
    assert f"python text_to_image/{script}.py" in text


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_answers_at_once(script):
    def seconds() -> float:
        started = time.perf_counter()
        help_of(script)
        return time.perf_counter() - started

    assert statistics.median(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_a_misspelt_flag_is_refused_in_one_line(script):
    done = python(ROOT / "text_to_image" / f"{script}.py", "--no_such_flag")
    assert done.returncode == 2
    assert "--no_such_flag" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_outside_the_environment_the_line_that_helps_is_printed(script, tmp_path):
    shutil.copytree(ROOT / "text_to_image", tmp_path / "rooms", ignore=shutil.ignore_patterns("starter", "*.txt"))
    (tmp_path / "rooms" / "starter" / "base").mkdir(parents=True)
    (tmp_path / "rooms" / "starter" / "captioner").mkdir()
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
    done = python("-S", tmp_path / "rooms" / f"{script}.py", *needed[script])
    assert done.returncode == 2
    assert "torch" in done.stderr and "bash job.sh setup" in done.stderr and len(done.stderr.splitlines()) == 1
