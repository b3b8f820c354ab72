"""Flags: unknown and out-of-range ones are refused, and only those that were given count as given."""

import pytest

from runtime.errors import UserError
from runtime.flags import (
    FlagParser,
    YesNo,
    absolute_path,
    expanded_path,
    filled_text,
    given_flags,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed_int,
    zero_to_one,
)


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser("script.py [flags]", "A script.", "  python script.py")
    parser.add_argument("--steps", type=positive_int, default=25)
    parser.add_argument("--ema", "--use_ema", action=YesNo, default=False)
    parser.add_argument("--prompt", action="append")
    return parser


def test_defaults_do_not_count_as_given(parser):
    assert given_flags(parser, ["--prompt", "a", "--prompt", "b"]) == {"prompt": ["a", "b"]}
    assert given_flags(parser, ["--steps", "25"]) == {"steps": 25}


def test_a_text_without_quotes_is_refused_without_showing_it(parser):
    with pytest.raises(UserError, match="no flag: 2;.*quotes") as error:
        parser.parse_args(["--prompt", "denim", "jeans", "hf_secret"])
    assert "hf_secret" not in str(error.value)


def test_a_path_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(expanded_path("~/run")) == "/somewhere/run" and str(expanded_path("run/~")) == "run/~"


@pytest.mark.parametrize("kind", [absolute_path, expanded_path, filled_text])
def test_an_empty_name_is_refused_and_is_not_the_working_directory(parser, kind):
    parser.add_argument("--folder", type=kind)
    for empty in ("", " "):
        with pytest.raises(UserError, match="--folder: it is empty"):
            parser.parse_args(["--folder", empty])


def test_every_name_of_a_yes_no_flag_can_be_negated(parser):
    assert given_flags(parser, ["--use_ema"]) == {"ema": True}
    assert given_flags(parser, ["--use_ema", "--no_ema"]) == {"ema": False}
    assert given_flags(parser, ["--no_use_ema"]) == {"ema": False}


@pytest.mark.parametrize("argv", [["--step", "3"], ["--unknown"], ["--steps"], ["stray"]])
def test_an_unknown_abbreviated_or_incomplete_flag_is_a_one_line_error(parser, argv):
    with pytest.raises(UserError) as error:
        given_flags(parser, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "wrong", "right"),
    [
        (positive_int, ["0", "-1", "1.5", "nan", "x", "", "9" * 400], "1"),
        (non_negative_int, ["-1", "1e3", "inf"], "0"),
        (positive_float, ["0", "nan", "inf", "-1"], "1e-5"),
        (non_negative_float, ["-0.1", "nan"], "0"),
        (zero_to_one, ["1.1", "-0.1", "nan"], "1"),
        (seed_int, ["-1", "0.5", str(2**63)], str(2**62)),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_name_of_the_flag(kind, wrong, right):
    parser = FlagParser("x", "x", "x")
    parser.add_argument("--number", type=kind)
    assert given_flags(parser, [f"--number={right}"])["number"] == float(right)
    for text in wrong:
        with pytest.raises(UserError, match="--number"):
            given_flags(parser, [f"--number={text}"])
