"""Where things lie in this repository, and how a path is printed. Standard library only."""

from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]  # text_to_image/
REPOSITORY = SCRIPTS.parent
DATASET = REPOSITORY / "dataset"
OUTPUTS = REPOSITORY / "output"  # of training runs, and what is converted or fetched
GENERATED = REPOSITORY / "Generated_sample"
STARTER = SCRIPTS / "starter" / "base"
STARTER_CAPTIONER = SCRIPTS / "starter" / "captioner"


def display_path(path: Path | str) -> str:
    """A path as one would type it: relative where it lies below the current folder."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
