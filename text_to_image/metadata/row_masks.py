"""The key `mask` of a row: the file that says where in its picture the loss counts. Standard library only."""

from collections.abc import Iterable
from pathlib import Path

from metadata.files import MetadataFile
from metadata.picture_names import PictureNames
from metadata.rows import read_rows, shown
from runtime.errors import UserError

MASK = "mask"


def mask_of(row: dict, file: MetadataFile, names: PictureNames) -> str | None:
    """The mask that a row of `file` names, as it is called on disk, from the folder of the data set; None where it
    names none. An empty value of a metadata.csv is none. Raises ValueError unless it is a file in the folder.
    """
    value = row.get(MASK)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"`{MASK}` must be the name of a file in the folder, like masks/1.png, found {shown(value)}")
    return names.find(file.full_name(value), MASK)


def mask_and_fault(row: dict, file: MetadataFile, names: PictureNames) -> tuple[str | None, str | None]:
    """(the mask, why training would refuse it), at most one of them."""
    try:
        return mask_of(row, file, names), None
    except ValueError as fault:
        return None, str(fault)


def named_masks(files: Iterable[MetadataFile]) -> set[Path]:
    """The masks that rows of the files name; what is wrong in them is refused by those who read their captions."""
    masks = set()
    for file in files:
        names = PictureNames(file.folder)
        try:
            rows = [row for _, row in read_rows(file.path) if isinstance(row, dict)]
        except UserError:
            continue
        found = (mask_and_fault(row, file, names)[0] for row in rows)
        masks |= {file.folder / name for name in found if name}
    return masks
