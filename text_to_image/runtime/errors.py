"""Errors that are expected, the exit code and the one line on stderr that each of them gets."""

import errno
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from runtime.locales import support_any_locale
from runtime.streams import make_streams_lossy, report_lost_output

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
# Required packages and the oldest versions whose interfaces are used; requirements.txt has the tested versions.
PACKAGES = {"torch": (2, 6), "diffusers": (0, 42), "transformers": (5, 0), "accelerate": (1, 0)}
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)  # another user's, or on a read-only disk
FILE_TOO_LARGE = "File too large"
DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    FILE_TOO_LARGE,
    "PytorchStreamWriter failed",
    "unexpected pos",
)
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN says this when a convolution finds no workspace (pytorch #108645), and also when it is unsupported.
    "unable to find an engine to execute",
)
# Failures that can be recognised only by the text of the exception: (texts, what happened and what helps).
FAILURES = (
    ((FILE_TOO_LARGE,), "a file would be larger than `ulimit -f` or the file system allows"),
    (DISK_FULL, "the disk is full, or a quota is used up; make room and run the same command again"),
    (
        OUT_OF_MEMORY,
        "not enough memory; in training --train_batch_size 1 with --gradient_accumulation_steps, "
        "--gradient_checkpointing, --mixed_precision bf16, --lora_rank 16 or a lower --resolution help",
    ),
    (
        ("failed to map segment", "Too many open files", "can't start new thread", "Resource temporarily unavailable"),
        "a limit of this shell or job is too low (`ulimit -a` lists them: -v memory, -n open files, -u processes); "
        "raise it, or ask the queue for more",
    ),
    (
        ("DataLoader worker",),
        "a process that reads pictures died, often for lack of memory; a lower --dataloader_num_workers helps",
    ),
    (
        ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "Timed out waiting"),
        "another process of this run ended or does not answer; run the same command again",
    ),
)


class UserError(Exception):
    """The user's input is wrong: the message names the file, line or flag, and what to do. Exit code 2."""


class WorkError(Exception):
    """The input is right, but the work could not be done or not completely (disk full, ...). Exit code 1."""


class InputChanged(WorkError):
    """A file that the run reads is gone or is not what it was; the message names it and says what to do. Exit code 1.

    In training a checkpoint is saved first.
    """


class WriteError(WorkError):
    """A file could not be written; `runtime.files.write_error` makes one."""


class Stopped(BaseException):
    """A signal asked the run to stop, and everything worth saving is saved. Exit code 75.

    A BaseException, like KeyboardInterrupt, so that a library's `except Exception` does not catch it.
    """


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main call and exits with its code. An expected error is one line on stderr; a bug propagates.

    The code tells of the work alone: what cannot be printed is dropped.
    """
    code: int | None
    make_streams_lossy()
    support_any_locale()
    try:
        code = work() or EXIT_DONE
    except BaseException as error:
        if (code := _report(error)) is None:
            raise
    report_lost_output()
    sys.exit(code)


def _report(error: BaseException) -> int | None:
    """Prints one line about an expected error and returns its exit code; None for anything else."""
    if isinstance(error, UserError | WorkError):
        _print_error(str(error))
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    if isinstance(error, Stopped | KeyboardInterrupt):
        # On a line of its own: a progress bar leaves its line open.
        print(f"\n{error if isinstance(error, Stopped) else 'interrupted'}", file=sys.stderr)
        return EXIT_STOPPED if isinstance(error, Stopped) else EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        if error.filename is None:
            return None
        read_only = "on a read-only disk; name another place"
        permission = "no permission; see `ls -ld` of it and of the folders above"
        _print_error(f"{error.filename}: {read_only if error.errno == errno.EROFS else permission}")
        return EXIT_USER
    if isinstance(error, Exception) and (advice := advice_for(error)):
        _print_error(f"{advice} ({first_line(_causes(error)[-1])})")
        return EXIT_FAILED
    return None


def _print_error(message: str) -> None:
    print(escape_control_chars(f"error: {message}"), file=sys.stderr)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space or quota, or at a limit on the size of a file.

    safetensors and torch say so only in their messages.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(text in str(error) for text in DISK_FULL)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the machine ran out of memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def advice_for(error: Exception) -> str | None:
    """What happened and what to do, for a failure that is not a bug; None for anything else."""
    # The last one, a lost connection, is a failure of this run only where the run has several processes.
    possible = FAILURES if int(os.environ.get("WORLD_SIZE", 1)) > 1 else FAILURES[:-1]
    said = "\n".join("out of memory" if isinstance(cause, MemoryError) else str(cause) for cause in _causes(error))
    return next((advice for texts, advice in possible if any(text in said for text in texts)), None)


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on: libraries wrap what fails while they are imported."""
    return [error, *_causes(error.__cause__)] if error.__cause__ else [error]


def escape_control_chars(text: str) -> str:
    """Replaces what a terminal would obey: captions and file names from elsewhere may hold escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def require_packages() -> None:
    """Raises UserError when a script runs outside its environment. Imports none of the packages."""
    problems = [problem for name, oldest in PACKAGES.items() if (problem := _package_problem(name, oldest))]
    if problems:
        raise UserError(
            f"{sys.executable}: {', '.join(problems)}; "
            "run `bash job.sh setup` once and start the scripts with `.venv/bin/python`"
        )


def _package_problem(package: str, oldest: tuple[int, int]) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        version = importlib.metadata.version(package)
        numbers = tuple(int(number) for number in version.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None  # a build without a proper version: assume it is new enough
    return f"{package} {version} is older than {'.'.join(map(str, oldest))}" if numbers < oldest else None
