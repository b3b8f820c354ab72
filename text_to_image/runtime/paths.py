"""The repository's own folders, and how a path is printed. Standard library only."""

import os
from os import PathLike
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]  # text_to_image/
REPOSITORY = SCRIPTS.parent
DATASET = REPOSITORY / "dataset"
STARTER = SCRIPTS / "starter" / "base"
STARTER_CAPTIONER = SCRIPTS / "starter" / "captioner"


def can_write(folder: str | PathLike[str]) -> bool:
    """Whether files can be made in `folder`, or the folder itself where it is missing. Nothing is written."""
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def own_or_current(name: str, repository: Path = REPOSITORY) -> Path:
    """The repository's folder `name`; that of the current folder where the repository is installed read-only.

    slurm/choices.sh chooses in the same way.
    """
    own = repository / name
    return own if can_write(own) else Path.cwd() / name


OUTPUTS = own_or_current("output")  # training runs, and models that were converted or downloaded
GENERATED = own_or_current("Generated_sample")


def read_only_note(folder: Path) -> str | None:
    """Why `folder` is where it is, if it is a default one that is not in the repository."""
    moved = any(default.parent != REPOSITORY and folder.is_relative_to(default) for default in (OUTPUTS, GENERATED))
    return "in the current folder: the repository cannot be written to (--output_dir)" if moved else None


def display_path(path: str | PathLike[str]) -> str:
    """The path as a user would type it: relative if it is below the current folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the current folder is gone
        return str(path)
