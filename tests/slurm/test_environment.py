"""What job.sh asks of a Python environment is answered with exit codes, one line, or the reason."""

import subprocess
import sys

import pytest

from clone import ROOT

ENVIRONMENT = ROOT / "text_to_image" / "slurm" / "environment.py"


@pytest.fixture
def ask(tmp_path):
    """Runs environment.py with a torch of these lines; None: with no packages at all."""

    def run(*words: str, torch: str | None = "", **environment: str) -> subprocess.CompletedProcess:
        (tmp_path / "torch.py").write_text(torch or "")
        command = [sys.executable, *(["-S"] if torch is None else []), str(ENVIRONMENT), *words]
        paths = {} if torch is None else {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env={**paths, **environment}, cwd=tmp_path)

    return run


def test_missing_packages_are_named_in_one_line(ask):
    for question in ("packages", "torch", "precision"):
        done = ask(question, torch=None)
        assert done.returncode == 2 and "torch is not installed" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_pytorch_that_cannot_be_imported_is_named_with_the_reason(ask):
    broken = "raise OSError('libcudart.so.12: no such file')"
    assert ask("packages", torch=broken).returncode == 0
    done = ask("torch", torch=broken)
    assert done.returncode == 2 and "libcudart.so.12" in done.stderr and len(done.stderr.splitlines()) == 1
    assert ask("torch").returncode == 0


def test_versions_are_one_line_without_an_import(ask):
    line = ask("versions", torch="raise RuntimeError('imported')").stdout
    assert line.startswith("Python 3.") and ", torch 2." in line and len(line.splitlines()) == 1
    assert ask("versions", torch=None).stdout.count(",") == 0


def test_gpus_that_can_be_used_pass(ask):
    torch = "def zeros(count, device): assert device in ('cuda:0', 'cuda:1')"
    assert ask("gpus", "2", torch=torch).returncode == 0


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("def zeros(count, device): raise RuntimeError('no such device')", "no such device"),
        (
            "import warnings\nwarnings.warn('The NVIDIA driver on your system is too old')\n"
            "def zeros(count, device): raise AssertionError('no CUDA')",
            "driver on your system is too old",
        ),
    ],
)
def test_a_gpu_that_cannot_be_used_fails_with_the_reason_and_what_helps(ask, torch, reason):
    done = ask("gpus", "1", torch=torch)
    assert done.returncode == 1 and reason in done.stderr.splitlines()[0]
    assert "TORCH_INDEX_URL" in done.stderr and "ACCELERATE_USE_CPU=true" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_question_is_refused(ask):
    assert ask("gpu").returncode == 2


def test_it_starts_although_python_does_not_look_beside_scripts(ask):
    assert ask("versions", PYTHONSAFEPATH="1").returncode == 0


def test_the_readme_that_it_points_to_exists():
    assert (ROOT / "text_to_image" / "slurm" / "README.md").is_file()
