"""Errors that are expected, the exit code and the one line on stderr that each of them gets."""

import errno
import importlib.metadata
import importlib.util
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from runtime.locales import support_any_locale

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
# Required packages and the oldest versions whose interfaces are used; requirements.txt has the tested versions.
PACKAGES = {"torch": (2, 6), "diffusers": (0, 42), "transformers": (5, 0), "accelerate": (1, 0)}
NO_PLACE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # a name that cannot be a file or folder
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)  # another user's, or on a read-only disk
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
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
    (DISK_FULL, "the disk is full, or a quota is used up; make room and run the same command again"),
    (
        OUT_OF_MEMORY,
        "not enough memory; in training --train_batch_size 1 with --gradient_accumulation_steps, "
        "--gradient_checkpointing, --mixed_precision bf16, --lora_rank 16 or a lower --resolution help",
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
# Why a download from the hub failed: the class of an exception in the chain of causes, and what it means.
HUB_REFUSALS = {
    "GatedRepoError": "its page on the hub asks you to accept terms first; then `hf auth login`",
    "RepositoryNotFoundError": "the hub has no repository of this name, or it is private (`hf auth login`)",
    "RevisionNotFoundError": "the hub has the repository, but not this revision",
    "OfflineModeIsEnabled": "it is not in the download cache, and HF_HUB_OFFLINE is set",
    "ConnectError": "the hub cannot be reached",  # httpx's
    "ConnectionError": "the hub cannot be reached",  # requests' and Python's own
    "TimeoutException": "the hub does not answer",
}


class UserError(Exception):
    """The user's input is wrong: the message names the file, line or flag, and what to do. Exit code 2."""


class WorkError(Exception):
    """The input is right, but the work could not be done or not completely (disk full, ...). Exit code 1."""


class Stopped(BaseException):
    """A signal asked the run to stop, and everything worth saving is saved. Exit code 75.

    A BaseException, like KeyboardInterrupt, so that a library's `except Exception` does not catch it.
    """


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main call and exits with its code. An expected error is one line on stderr; a bug propagates."""
    support_any_locale()
    code: int | None
    try:
        code = work() or EXIT_DONE
        sys.stdout.flush()
    except BaseException as error:
        if (code := _report(error)) is None:
            raise
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
    if isinstance(error, BrokenPipeError):
        return _end_output() if _is_closed(sys.stdout) else None
    if isinstance(error, OSError) and error.errno in NO_PLACE and error.filename is not None:
        _print_error(f"{error.filename}: {error.strerror}; name another place")
        return EXIT_USER
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        if error.filename is None:
            return None
        read_only = "on a read-only disk; name another place"
        permission = "no permission; see `ls -ld` of it and of the folders above"
        _print_error(f"{error.filename}: {read_only if error.errno == errno.EROFS else permission}")
        return EXIT_USER
    if isinstance(error, Exception) and (advice := advice_for(error)):
        _print_error(f"{advice} ({first_line(error)})")
        return EXIT_FAILED
    return None


def _print_error(message: str) -> None:
    print(escape_control_chars(f"error: {message}"), file=sys.stderr)


def _end_output() -> int:
    """The reader of stdout, such as `head`, is gone: what Python still flushes at exit goes to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED


def _is_closed(stream: TextIO) -> bool:
    """Whether the reading end of the pipe behind `stream` is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not backed by a file descriptor
        return False
    return bool(poll.poll(0))


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for lack of space or quota; safetensors and torch say so only in their messages."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error) for text in DISK_FULL)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the machine ran out of memory."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def advice_for(error: Exception) -> str | None:
    """What happened and what to do, for a failure that is not a bug; None for anything else."""
    if is_disk_full(error):
        return FAILURES[0][1]
    # The last one, a lost connection, is a failure of this run only where the run has several processes.
    possible = FAILURES if int(os.environ.get("WORLD_SIZE", 1)) > 1 else FAILURES[:-1]
    return next((advice for texts, advice in possible if any(text in str(error) for text in texts)), None)


def escape_control_chars(text: str) -> str:
    """Replaces what a terminal would obey: captions and file names from elsewhere may hold escape sequences."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the name of its class where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub_error_reason(error: Exception) -> str:
    """Why a download from the hub failed, by the chain of causes; else the first line of the error itself."""
    cause: BaseException | None = error
    while cause:
        classes = {base.__name__ for base in type(cause).__mro__}
        if reason := next((reason for name, reason in HUB_REFUSALS.items() if name in classes), None):
            return reason
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


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
