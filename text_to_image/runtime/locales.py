"""Scripts in any locale: file names are UTF-8, every message reaches the terminal or log. Standard library only."""

import os
import sys
from io import TextIOWrapper


def support_any_locale() -> None:
    """Characters that a terminal lacks are printed as \\u escapes; without a UTF-8 locale the script starts once more.

    Without one Python would read and write file names in the locale's encoding, so that no name in metadata.jsonl
    would be the picture's. https://peps.python.org/pep-0540/
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        terminal = f"{sys.stdout.encoding}:backslashreplace"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": terminal}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # the process stays the same
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
