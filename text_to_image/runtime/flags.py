"""Command-line flags: a parser whose mistakes are one line, checked number types, `--name`/`--no_name`."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from runtime.errors import UserError


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are one line (UserError) and that accepts no abbreviated flag."""

    def __init__(self, usage: str, description: str, examples: str):
        super().__init__(
            usage=usage,  # argparse's own would fill a screen
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):  # the flags' names alone: a value may be a token
            words = message.removeprefix("unrecognized arguments: ").split()
            unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
            lost = f"words that belong to no flag: {len(words)}; a text of several words wants quotes"
            message = f"unknown: {' '.join(unknown)}" if unknown else lost
        raise UserError(f"{message}; {self.prog} --help lists the flags")


class YesNo(argparse.Action):
    """`--name` and `--no_name`; argparse's own BooleanOptionalAction would spell it `--no-name`."""

    def __init__(self, option_strings, dest, **settings):
        negated = [option.replace("--", "--no_", 1) for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs=0, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def positive_int(text: str) -> int:
    return _number(text, int, "a whole number of at least 1", lambda number: number >= 1)


def non_negative_int(text: str) -> int:
    return _number(text, int, "a whole number of at least 0", lambda number: number >= 0)


def positive_float(text: str) -> float:
    return _number(text, float, "a number above 0", lambda number: number > 0)


def non_negative_float(text: str) -> float:
    return _number(text, float, "a number of at least 0", lambda number: number >= 0)


def fraction(text: str) -> float:
    return _number(text, float, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def below_one(text: str) -> float:
    return _number(text, float, "a number from 0 to below 1", lambda number: 0 <= number < 1)


def up_to_half(text: str) -> float:
    return _number(text, float, "a number from 0 to 0.5", lambda number: 0 <= number <= 0.5)


def path(text: str) -> Path:
    """A shell leaves the ~ in --flag=~/folder as it is."""
    return Path(os.path.expanduser(text))


def text(words: str) -> str:
    """Any text that can be written to a file: a byte that is no UTF-8 comes as half a character."""
    if any("\ud800" <= character <= "\udfff" for character in words):
        raise argparse.ArgumentTypeError("it is not UTF-8, or holds half a character (a lone surrogate)")
    return words


def seed(text: str) -> int:
    return _number(text, int, "a whole number from 0 to 2^63 - 1", lambda number: 0 <= number < 2**63)


def _number(text: str, kind: type, wanted: str, is_right: Callable[[float], bool]) -> float:
    try:
        number = kind(text)
        accepted = math.isfinite(number) and is_right(number)
    except (ValueError, OverflowError):  # no number, or more digits than a float can hold
        accepted = False
    if not accepted:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return number


def given_flags(parser: FlagParser, argv: Sequence[str] | None) -> dict[str, object]:
    """Only what stands in `argv` (None: the command line); raises UserError on an unknown flag or a wrong value."""
    names = vars(parser.parse_args(argv))
    # argparse fills in a default only where the namespace lacks the name, so None marks 'not given'.
    blank = argparse.Namespace(**dict.fromkeys(names))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
