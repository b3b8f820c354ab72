"""Command-line flags: a parser with one-line errors, number types with a range, `--name`/`--no_name` switches."""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime.errors import UserError

Number = TypeVar("Number", int, float)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError with a one-line message and accepts no abbreviated flags."""

    def __init__(self, usage: str, description: str, examples: str, foreign: Mapping[str, str] | None = None):
        self.foreign = foreign or {}  # flags of other programs: why there is no such flag here
        super().__init__(
            usage=usage,  # argparse's own would fill a screen
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            message = self._describe_unknown(message.removeprefix(prefix).split())
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def _describe_unknown(self, words: Sequence[str]) -> str:
        """Names the flags only, never their values: a value may be a token."""
        unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
        for flag in filter(self.foreign.get, unknown):
            return f"{flag}: {self.foreign[flag]}"
        if unknown:
            return f"unknown flags: {' '.join(unknown)}"
        return f"words that belong to no flag: {len(words)}; put a text of several words in quotes"


class YesNo(argparse.Action):
    """`--name` and `--no_name`; argparse's BooleanOptionalAction would spell the second `--no-name`."""

    nargs: int | str = 0

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        negated = [option.replace("--", "--no_", 1) for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs=self.nargs, **settings)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


class YesNoOrShare(YesNo):
    """`--name` (True), `--name 0.3` and `--no_name` (False)."""

    nargs = "?"

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        if values is None:
            super().__call__(parser, namespace, values, option_string)
        elif (option_string or "").startswith("--no_"):
            parser.error(f"argument {option_string}: takes no value")
        else:
            setattr(namespace, self.dest, values)


def positive_int(text: str) -> int:
    return _number(text, int, "a whole number of at least 1", lambda number: number >= 1)


def non_negative_int(text: str) -> int:
    return _number(text, int, "a whole number of at least 0", lambda number: number >= 0)


def seed_int(text: str) -> int:
    return _number(text, int, "a whole number from 0 to 2^63 - 1", lambda number: 0 <= number < 2**63)


def positive_float(text: str) -> float:
    return _number(text, float, "a number above 0", lambda number: number > 0)


def non_negative_float(text: str) -> float:
    return _number(text, float, "a number of at least 0", lambda number: number >= 0)


def zero_to_one(text: str) -> float:
    return _number(text, float, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def below_one(text: str) -> float:
    return _number(text, float, "a number from 0 to below 1", lambda number: 0 <= number < 1)


def up_to_half(text: str) -> float:
    return _number(text, float, "a number from 0 to 0.5", lambda number: 0 <= number <= 0.5)


def _number(text: str, kind: Callable[[str], Number], wanted: str, in_range: Callable[[Number], bool]) -> Number:
    try:
        number = kind(text)
        accepted = math.isfinite(number) and in_range(number)
    except (ValueError, OverflowError):  # not a number, or more digits than a float can hold
        accepted = False
    if not accepted:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def filled_text(text: str) -> str:
    """A name that is not empty: an unset variable of the shell would name the working directory, or the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name it, or leave the flag out")
    return text


def expanded_path(text: str) -> Path:
    """Expands ~, which the shell leaves alone in --flag=~/folder."""
    return Path(os.path.expanduser(filled_text(text)))


def absolute_path(text: str) -> Path:
    """As `expanded_path`, and found from any folder: for what a run records and reads again later."""
    return expanded_path(text).absolute()


def utf8_text(text: str) -> str:
    """Text that can be written to a file: Python turns a byte that is not UTF-8 into a lone surrogate."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError("it is not UTF-8, or holds half a character (a lone surrogate)")
    return text


def given_flags(parser: FlagParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Only the flags that stand in `argv` (None: the command line), without defaults.

    Raises UserError for an unknown flag or a wrong value.
    """
    names = vars(parser.parse_args(argv))
    # argparse fills in a default only where the namespace lacks the name, so None marks 'not given'.
    blank = argparse.Namespace(**dict.fromkeys(names))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
