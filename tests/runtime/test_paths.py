"""Default folders are the repository's, or those of the current folder where the repository cannot be written to."""

import shutil
import subprocess
import sys

import pytest

from clone import ROOT
from runtime.paths import REPOSITORY, can_write, own_or_current

READ_ONLY = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind -o ro "$0" "$0" && exec "$@"']


def test_a_folder_can_be_written_to_where_it_or_its_parent_is_one(tmp_path):
    (tmp_path / "file").touch()
    assert can_write(tmp_path) and can_write(tmp_path / "new" / "folder")
    assert not can_write(tmp_path / "file") and not can_write(tmp_path / "file" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_default_folders_move_only_where_the_repository_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert own_or_current("output", tmp_path / "file") == tmp_path / "output"
    assert own_or_current("output") == REPOSITORY / "output"


def test_of_a_read_only_installation_results_go_to_the_current_folder(tmp_path):
    if not shutil.which("unshare") or subprocess.run([*READ_ONLY, ROOT, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here (unshare --map-root-user --mount)")
    code = "from runtime.paths import *; print(OUTPUTS, GENERATED, read_only_note(OUTPUTS / 'x'), sep='\\n')"
    command = [*READ_ONLY, ROOT, sys.executable, "-B", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "text_to_image")}, capture_output=True, text=True
    )
    outputs, generated, note = done.stdout.splitlines()
    assert [outputs, generated] == [str(tmp_path / "output"), str(tmp_path / "Generated_sample")]
    assert "repository cannot be written to" in note
