"""A wrong flag of any script is named, with the script that lists the right ones."""

import subprocess
import sys

import pytest

from clone import ROOT
from slurm.check_flags import split_counted

CHECK = ROOT / "text_to_image" / "slurm" / "check_flags.py"


def check(captioning: list[str], training: list[str], generation: list[str]) -> subprocess.CompletedProcess:
    words = [word for flags in (captioning, training, generation) for word in (str(len(flags)), *flags)]
    return subprocess.run([sys.executable, CHECK, *words], capture_output=True, text=True)


def test_any_word_can_stand_in_a_group():
    assert split_counted(["2", "--prompt", "3", "0", "1", ""]) == [["--prompt", "3"], [], [""]]


def test_right_flags_pass_without_a_word():
    done = check(["--recursive"], ["--dataset", "some/dataset", "--epochs", "3"], ["--prompt", "--jeans"][:1] + ["x"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("wrong", range(3))
def test_a_wrong_flag_is_one_line_that_names_flag_and_script(wrong):
    groups: list[list[str]] = [[], ["--dataset", "x"], []]
    groups[wrong] = [*groups[wrong], "--no_such_flag"]
    done = check(*groups)
    script = ("img_captioning.py", "train_text_to_image.py", "inference.py")[wrong]
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--no_such_flag" in done.stderr and script in done.stderr
