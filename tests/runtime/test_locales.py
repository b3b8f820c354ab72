"""Scripts in any locale: messages reach terminals of any encoding, file names are what metadata.jsonl says."""

import json
import os
import subprocess
import sys

import pytest

from clone import ROOT

START = "import sys; sys.path.insert(0, sys.argv[1]); from runtime.errors import UserError, exit_with\n"


def run_script(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", START + code, ROOT / "text_to_image", *arguments]
    unset = {"LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(command, capture_output=True, env={**inherited, **environment})


@pytest.mark.parametrize("name", ["PYTHONIOENCODING", "LC_ALL"])
def test_what_a_terminal_cannot_show_is_escaped(name):
    environment = {"PYTHONIOENCODING": "latin-1"} if name == "PYTHONIOENCODING" else {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run_script("exit_with(lambda: print('on the \\u5de6 side') or 3)", **environment)
    assert (done.returncode, done.stdout) == (3, b"on the \\u5de6 side\n"), done.stderr
    done = run_script("def work(): raise UserError('\\u5de6.jpg')\nexit_with(work)", **environment)
    assert (done.returncode, done.stderr) == (2, b"error: \\u5de6.jpg\n")


def test_what_a_terminal_can_show_keeps_its_encoding():
    done = run_script("exit_with(lambda: print('caf\\xe9'))", PYTHONIOENCODING="latin-1")
    assert done.stdout == b"caf\xe9\n"


def test_file_names_are_read_as_utf8_without_a_utf8_locale(tmp_path):
    (tmp_path / "\u72d7 \xe9.jpg").touch()
    code = "import json, os; exit_with(lambda: print(json.dumps([sys.argv[2:], os.listdir(sys.argv[2])])))"
    done = run_script(code, tmp_path, LC_ALL="C", PYTHONUTF8="0")
    assert json.loads(done.stdout) == [[str(tmp_path)], ["\u72d7 \xe9.jpg"]]
