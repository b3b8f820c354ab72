"""Files of a data set that a run is known by: their content is compared each time they are read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import ClassVar, TypeVar

from data.file_facts import FileFacts
from metadata.containers import read_bytes
from runtime.errors import InputChanged

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class InputFile:
    """A file as it was before the run."""

    path: Path
    facts: FileFacts | None = field(default=None, compare=False, repr=False, kw_only=True)  # of earlier starts
    noun: ClassVar[str] = "file"

    @cached_property
    def sha256(self) -> str:
        """Of the file as it was when this was first asked for: before the run, which is known by it."""
        return self.fact("sha256", lambda: hashlib.sha256(self._read()).hexdigest())

    def fact(self, name: str, find: Callable[[], Fact]) -> Fact:
        """What an earlier start has found of the file, if it has not changed since, else what `find` returns."""
        return self.facts.of(self.path, name, find) if self.facts else find()

    def open(self) -> BytesIO:
        """The content that `sha256` is of. Raises InputChanged where the file is gone or has another.

        The hash takes a fortieth of the time of decoding, and leaves no moment in which the file could change unseen.
        """
        content = self._read()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputChanged(
                f"{self.path}: another {self.noun} than when the run began; put back the one that was there, and the "
                "same command goes on; with this one a run begins anew"
            )
        return BytesIO(content)

    def _read(self) -> bytes:
        try:
            return read_bytes(self.path)
        except FileNotFoundError:
            fault = "no such file any more"
        except OSError as error:
            fault = f"cannot be read any more ({error.strerror})"
        raise InputChanged(f"{self.path}: {fault}; put it back as it was, and the same command goes on")
