"""Answers what job.sh asks of a Python environment: are its packages, its PyTorch and its GPUs usable?

python environment.py packages     exit code 2 and one line where a package is missing or too old
python environment.py torch        the same, and where PyTorch cannot be imported
python environment.py versions     prints the versions of Python and of the packages
python environment.py gpus 4       exit code 1 and the reason where PyTorch cannot use so many GPUs
python environment.py precision    prints the --mixed_precision that suits the GPU or CPU, or an empty line
"""

import importlib.metadata
import platform
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.errors import PACKAGES, UserError, WorkError, exit_with, first_line, require_packages


def check_torch() -> None:
    """UserError where a package is missing, or where PyTorch cannot be imported."""
    require_packages()
    try:
        import torch  # noqa: F401
    except Exception as error:  # ImportError or OSError, for a library that is missing or of another CUDA
        raise UserError(f"{sys.executable}: its PyTorch does not work: {first_line(error)}") from None


def list_versions() -> str:
    """'Python 3.12.1, torch 2.14.0, ...', without packages that are not installed."""
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(versions)


def check_gpus(count: int) -> None:
    """WorkError with the reason where PyTorch cannot use `count` GPUs: on a CPU the job would take weeks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch

            for number in range(count):
                torch.zeros(1, device=f"cuda:{number}")
        except Exception as error:  # each kind of fault has a class of its own
            # Where the driver is too old, the error itself only says that there is no GPU.
            driver = [str(warning.message) for warning in caught if "driver" in str(warning.message)]
            reason = driver[0].splitlines()[0] if driver else first_line(error)
            raise WorkError(
                f"the job asked for a GPU and PyTorch cannot use it: {reason}\n"
                "  If the driver is too old, set up again with TORCH_INDEX_URL (see text_to_image/slurm/README.md).\n"
                "  ACCELERATE_USE_CPU=true sbatch job.sh trains on the CPU."
            ) from None


def find_precision() -> str:
    """'bf16' or 'fp16' where that trains faster, on a GPU and on some CPUs, else ''."""
    require_packages()
    from runtime.devices import best_training_precision

    return best_training_precision() or ""


def main() -> None:
    match sys.argv[1:]:
        case ["packages"]:
            require_packages()
        case ["torch"]:
            check_torch()
        case ["versions"]:
            print(list_versions())
        case ["gpus", count]:
            check_gpus(int(count))
        case ["precision"]:
            print(find_precision())
        case words:
            raise UserError(f"environment.py does not know {' '.join(words)!r}; its first lines list what it knows")


if __name__ == "__main__":
    exit_with(main)
