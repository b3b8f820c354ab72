"""The key `repeats` of a row: how often its picture is used in a pass over the data set."""

import math

from metadata.rows import shown

REPEATS = "repeats"
MOST_REPEATS = 10_000  # a pass is kept in memory as a list


def repeats_of(row: dict) -> float:
    """The number of a row, 1 where it has none; an empty value of a metadata.csv is none. Raises ValueError."""
    value = row.get(REPEATS)
    if value is None or value == "":
        return 1.0
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= MOST_REPEATS:
        raise ValueError(
            f"`{REPEATS}` must be a number above 0 and at most {MOST_REPEATS}, like 2 or 0.5, found {shown(value)}; "
            "a picture that is not to be used needs no row"
        )
    return number


def repeats_fault(row: dict) -> str | None:
    """Why training would refuse the `repeats` of the row; None where it takes them."""
    try:
        repeats_of(row)
    except ValueError as fault:
        return str(fault)
    return None
