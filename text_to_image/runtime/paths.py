"""The repository's own folders, and how a path is printed. Standard library only."""

from os import PathLike
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]  # text_to_image/
REPOSITORY = SCRIPTS.parent
DATASET = REPOSITORY / "dataset"
OUTPUTS = REPOSITORY / "output"  # training runs, and models that were converted or downloaded
GENERATED = REPOSITORY / "Generated_sample"
STARTER = SCRIPTS / "starter" / "base"
STARTER_CAPTIONER = SCRIPTS / "starter" / "captioner"


def display_path(path: str | PathLike[str]) -> str:
    """The path as a user would type it: relative if it is below the current folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
