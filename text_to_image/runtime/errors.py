"""The user's mistakes and the work's failures, and the exit codes the three scripts end with."""

import errno
import importlib.metadata
import importlib.util
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
# What the scripts cannot do without, and the oldest versions whose interfaces they use; requirements.txt has what is
# tested.
PACKAGES = {"torch": (2, 6), "diffusers": (0, 42), "transformers": (5, 0), "accelerate": (1, 0)}
DISK_FULL = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "unexpected pos")
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN's, where no convolution has room to work (pytorch #108645); what it cannot compute at all sounds alike.
    "unable to find an engine to execute",
)
# Failures that libraries tell by their words alone: the words, what has happened and what helps.
FAILURES = (
    (DISK_FULL, "the disk is full, or a quota is used up; make room and run the same command again"),
    (
        OUT_OF_MEMORY,
        "not enough memory; in training --train_batch_size 1 with --gradient_accumulation_steps, "
        "--gradient_checkpointing, --mixed_precision bf16, --lora_rank 16 or a lower --resolution help",
    ),
    (
        ("DataLoader worker",),
        "a process that reads pictures has died, often for lack of memory; a lower --dataloader_num_workers helps",
    ),
    (
        ("Connection closed by peer", "Connection reset by peer", "Socket Timeout", "Timed out waiting"),
        "another process of this run has ended or does not answer; run the same command again",
    ),
)
# Why the hub does not give something: the class of an error among its causes, and what that means.
HUB_REFUSALS = {
    "GatedRepoError": "its page on the hub asks you to accept terms first; then `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of this name, or shows it to others only (`hf auth login`)",
    "RevisionNotFoundError": "the hub has it, but not this revision",
    "OfflineModeIsEnabled": "it was not downloaded before, and HF_HUB_OFFLINE is set",
    "ConnectError": "the hub cannot be reached",  # httpx's
    "ConnectionError": "the hub cannot be reached",  # requests' and Python's own
    "TimeoutException": "the hub does not answer",
}


class UserError(Exception):
    """The input was wrong: the message names the file, line or flag, and what to do. Exit code 2."""


class WorkError(Exception):
    """The input was right but the work could not be done, or not wholly (disk full, ...). Exit code 1."""


class Stopped(BaseException):
    """The work was asked to stop by a signal, and what there was to save is saved. Exit code 75.

    Like KeyboardInterrupt no Exception: a library that catches those must not catch this on its way.
    """


def exit_with(work: Callable[[], int | None]) -> NoReturn:
    """Runs a script's one call and exits with its code; a mistake is one line on stderr, never a traceback."""
    try:
        code = work() or EXIT_DONE
        sys.stdout.flush()
    except (UserError, WorkError) as error:
        print(escape_control_chars(f"error: {error}"), file=sys.stderr)
        code = EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)  # on a line of its own: a bar's is not ended
        code = EXIT_STOPPED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        # Whoever read what is printed, `head` say, wants no more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written at the exit
        code = EXIT_FAILED
    except PermissionError as error:
        if error.filename is None:
            raise
        name = escape_control_chars(str(error.filename))
        print(f"error: {name}: no permission; see `ls -ld` of it and of the folders above", file=sys.stderr)
        code = EXIT_USER
    except Exception as error:
        if not (helps := advice_for(error)):
            raise
        print(escape_control_chars(f"error: {helps} ({first_line(error)})"), file=sys.stderr)
        code = EXIT_FAILED
    sys.exit(code)


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads it any more."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return bool(poll.poll(0))


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for lack of space or quota; safetensors and torch tell it by their words alone."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in DISK_FULL)


def is_out_of_memory(error: Exception) -> bool:
    """Whether it was the GPU's memory or the machine's that did not suffice."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def advice_for(error: Exception) -> str | None:
    """For a failure that is no bug: what has happened and what to do. None for anything else."""
    if is_disk_full(error):
        return FAILURES[0][1]
    possible = FAILURES if int(os.environ.get("WORLD_SIZE", 1)) > 1 else FAILURES[:-1]
    return next((helps for words, helps in possible if any(word in str(error) for word in words)), None)


def escape_control_chars(text: str) -> str:
    """The text without what a terminal would obey: other people's captions and file names may hold such codes."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def first_line(error: Exception) -> str:
    """What a library's error says, without its further explanations; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub_error_reason(error: Exception) -> str:
    """Why something is not to be had from the hub; where no cause is known, the first line of the error itself."""
    cause: BaseException | None = error
    while cause:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if reason := next((reason for name, reason in HUB_REFUSALS.items() if name in kinds), None):
            return reason
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def require_packages() -> None:
    """Raises UserError with the line that helps where a script runs outside its environment; imports nothing."""
    faults = [fault for name, oldest in PACKAGES.items() if (fault := _fault_of(name, oldest))]
    if faults:
        raise UserError(
            f"{sys.executable}: {', '.join(faults)}; "
            "run `bash job.sh setup` once and start the scripts with `.venv/bin/python`"
        )


def _fault_of(package: str, oldest: tuple[int, int]) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        version = importlib.metadata.version(package)
        numbers = tuple(int(number) for number in version.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None  # built by hand: it will know
    return f"{package} {version} is older than {'.'.join(map(str, oldest))}" if numbers < oldest else None
