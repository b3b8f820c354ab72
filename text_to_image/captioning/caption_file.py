"""The metadata file that the captions of a folder of pictures are in, and which of the pictures have a row there."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from metadata.containers import find_containers
from metadata.files import (
    MetadataFile,
    find_metadata_files,
    named_metadata_file,
    near_miss_message,
    own_metadata_file,
    pictures_without_row,
)
from metadata.image_files import (
    METADATA,
    METADATA_FILES,
    find_image_files,
    find_nested_image_files,
    find_unsupported_files,
    no_pictures_message,
)
from metadata.picture_names import LINK_ADVICE
from metadata.reading import ScannedRow, scan_captions, scan_rows
from metadata.row_masks import named_masks
from metadata.sidecars import distant_sidecars_message
from metadata.writer import Existing
from runtime.errors import UserError

SHOWN_FAULTS = 10


@dataclass(frozen=True)
class CaptionFile:
    """Where the captions of `image_dir` are, and the names that its pictures have there."""

    path: Path
    image_dir: Path
    prefix: PurePosixPath  # from the folder that the names are relative to, to `image_dir`
    recursive: bool
    column: str = "text"

    @property
    def root(self) -> Path:
        """The folder that the names are relative to."""
        return self.image_dir if self.prefix == PurePosixPath() else self.path.parent

    @property
    def is_of_data_set(self) -> bool:
        """Whether training on `image_dir` reads this file without being told to."""
        return MetadataFile(self.path, self.image_dir).is_of_folder

    @property
    def is_csv(self) -> bool:
        """Then it is somebody else's, and only read."""
        return self.path.suffix.lower() == ".csv"

    def pictures(self) -> list[Path]:
        return self._without_masks(find_image_files(self.image_dir, self.recursive))

    def unsupported_files(self) -> list[Path]:
        return find_unsupported_files(self.image_dir, self.recursive)

    def nested_pictures(self) -> list[Path]:
        """The pictures in sub-folders that only --recursive captions."""
        if self.recursive:
            return []
        nested = [path for path in find_nested_image_files(self.image_dir) if path.parent != self.image_dir]
        return self._without_masks(nested)

    def pictures_of_other_files(self) -> list[Path]:
        """The pictures in sub-folders that have a metadata file of their own."""
        files = find_metadata_files(self.image_dir) if self.is_of_data_set else []
        return self._without_masks(pictures_without_row(files, ()))

    def _without_masks(self, paths: list[Path]) -> list[Path]:
        return [path for path in paths if path not in self._named_masks]

    @cached_property
    def _named_masks(self) -> set[Path]:
        """What rows name as masks, in this file or in those that training finds in the folder: no captioning changes
        that."""
        files = find_metadata_files(self.image_dir)
        if self.path.exists() and not self.is_of_data_set:
            files.append(MetadataFile(self.path, self.root))
        return named_masks(files)

    def name_of(self, picture: Path) -> str:
        return (self.prefix / picture.relative_to(self.image_dir).as_posix()).as_posix()

    def rows(self) -> list[ScannedRow]:
        """Where training reads the file, also the rows of sub-folders with a metadata file of their own."""
        if self.is_of_data_set:
            return scan_captions(self.root, self.column)
        return scan_rows(self.path, self.root, self.column)

    def without_row(self, rows: Iterable[ScannedRow], among: Iterable[Path] | None = None) -> list[Path]:
        """The pictures that no row names, of `among` or of all."""
        named = {PurePosixPath(row.file_name) for row in rows}
        pictures = self.pictures() if among is None else among
        return [picture for picture in pictures if PurePosixPath(self.name_of(picture)) not in named]

    def advice_elsewhere(self) -> str:
        """What to do where the file cannot be written."""
        advice = "name another file with --output, and to training with --metadata_file (job.sh: METADATA_FILE)"
        return f"{advice}; to keep the rows of this one, copy it there first" if self.path.exists() else advice

    def training_hint(self) -> str | None:
        """How training reads the file, or why not; None where --dataset with the folder of pictures will do."""
        if self.is_of_data_set:
            return None
        if links := self.outside_links():
            return f"training refuses pictures that are links out of the folder, such as {links[0]}; {LINK_ADVICE}"
        flags = f"--dataset {shlex.quote(str(self.root))} --metadata_file {shlex.quote(str(self.path))}"
        return f"training reads these captions with {flags}"

    def outside_links(self) -> list[str]:
        """The pictures that are links out of the folder that the names are relative to: training refuses them."""
        root = self.root.resolve()
        return [self.name_of(path) for path in self.pictures() if not path.resolve().is_relative_to(root)]

    def pending(self, existing: Existing) -> list[Path]:
        """The pictures that are to be captioned."""
        if existing == "replace":
            return self.pictures()
        rows = self.rows()
        return [*(self.with_empty_row(rows) if existing == "fill" else ()), *self.without_row(rows)]

    def with_empty_row(self, rows: Iterable[ScannedRow]) -> list[Path]:
        """The pictures in the folder whose row in this file has an empty caption."""
        names = [PurePosixPath(row.file_name) for row in rows if row.is_empty and row.is_own and not row.picture_fault]
        prefix = self.prefix
        return [self.image_dir / name.relative_to(prefix) for name in names if name.is_relative_to(prefix)]

    def completion_message(self, existing: Existing = "keep") -> str | None:
        """Says that every picture has a row, and how many have no caption; None where one is to be captioned."""
        if existing == "replace" or self.pending(existing):
            return None
        rows, pictures = self.rows(), len(self.pictures())
        message = f"all {pictures} pictures in {self.image_dir} have a row"
        if not pictures:
            message = f"no pictures directly in {self.image_dir}, and {len(rows)} rows for other pictures"
        if empty := len(self.with_empty_row(rows)):
            captions = "1 caption is" if empty == 1 else f"{empty} captions are"
            message += f"; {captions} empty or not there: write it by hand, or let --existing fill do it"
        return "\n  ".join([message, *self._faults_to_mend(rows)])

    def _faults_to_mend(self, rows: Iterable[ScannedRow]) -> list[str]:
        """The rows without a right caption that --existing fill leaves as they are, with a line above them."""
        fillable = {self.name_of(path) for path in self.with_empty_row(rows)}
        faulty = [row for row in rows if row.caption_fault and PurePosixPath(row.file_name).as_posix() not in fillable]
        lines = [f"{row.where}: {row.picture_fault or row.caption_fault}" for row in faulty[:SHOWN_FAULTS]]
        more = [f"... and {len(faulty) - len(lines)} more; --check lists all"] if len(lines) < len(faulty) else []
        return ["to be mended by hand:", *lines, *more] if lines else []


def locate_caption_file(image_dir: Path, output: Path | None, recursive: bool, column: str = "text") -> CaptionFile:
    """The metadata file in `image_dir`, or the file `output`. UserError where that is a folder or cannot be written.

    Names are relative to `image_dir`; in a metadata.jsonl further up they are relative to its folder, as `datasets`
    reads them.
    """
    path = output or own_metadata_file(image_dir) or image_dir / METADATA
    if path.is_dir():
        if output:
            raise UserError(f"--output {path}: a folder; name a file, such as {path / METADATA}")
        raise UserError(f"{path}: a folder, not a file with captions; move it away, or name a file with --output")
    if output and path.suffix.lower() == ".csv" and not path.exists():
        raise UserError(f"--output {path}: captions are written as lines of JSON; name a file such as {METADATA}")
    if not output and (near_miss := near_miss_message(image_dir)):
        raise UserError(near_miss)
    return CaptionFile(path, image_dir, named_metadata_file(path, image_dir).names_begin, recursive, column)


def require_pictures_or_rows(file: CaptionFile) -> None:
    """UserError where the folder has no pictures and the file has no rows."""
    if containers := find_containers(file.image_dir):
        raise UserError(
            f"{containers[0]}: its captions are in it, too (1.txt beside 1.jpg in a tar shard, a column of a parquet "
            "file), and nothing is captioned there; pictures in a folder can be captioned"
        )
    if not file.pictures() and not file.rows():
        raise UserError(no_pictures_message(file.image_dir, file.recursive))


def refuse_outside_links(file: CaptionFile) -> None:
    """UserError where a picture of a metadata.jsonl is a link out of the folder: training would refuse its row."""
    if file.path.name not in METADATA_FILES:
        return
    if outside := file.outside_links():
        links = "1 picture is a link" if len(outside) == 1 else f"{len(outside)} pictures are links"
        raise UserError(
            f"{file.image_dir}: {links} out of the folder, which training refuses: {outside[0]}; {LINK_ADVICE}"
        )


def refuse_misspelt_names(file: CaptionFile) -> None:
    """UserError where a picture without a row has one under a name that is almost its own."""
    rows = file.rows()
    names = {file.name_of(path) for path in file.without_row(rows)}
    if faults := [f"{row.where}: {row.picture_fault}" for row in rows if row.meant in names]:
        raise UserError("\n  ".join([f"{file.path} names pictures that are not there; mend the names:", *faults]))


def refuse_other_column(file: CaptionFile) -> None:
    """UserError where the rows have their captions under another key than the one that would be written."""
    rows = file.rows()
    if any(row.captions for row in rows):
        return
    if other := next((row for row in rows if row.other_column), None):
        raise UserError(f"{file.path}, {other.where}: {other.caption_fault}")


def refuse_distant_text_files(file: CaptionFile, existing: Existing) -> None:
    """UserError where text files of pictures that are to be captioned lie in another folder than these."""
    if message := distant_sidecars_message(file.image_dir, file.pending(existing)):
        raise UserError(message)


def remove_partial_caption_files(file: CaptionFile) -> None:
    """Removes what a killed run left half-written. Only the holder of the lock may call it."""
    for path in {file.path, file.path.resolve()}:  # a file written through a link is beside what the link leads to
        prefixes, lock = (f".{path.name}.", f"..{path.name}.replacing."), f".{path.name}.lock"
        for beside in path.parent.iterdir() if path.parent.is_dir() else ():
            is_ours = beside.name.startswith(prefixes) and not beside.name.startswith(lock)
            if is_ours and beside.name.endswith(".part"):
                beside.unlink(missing_ok=True)
