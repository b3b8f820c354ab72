"""job.sh in a copy of the repository whose scripts only record, and on a machine whose Pythons only pretend."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clone import ROOT
from runtime.devices import _cpu_precision

CHOICES = ("MODEL", "CAPTIONER", "DATASET", "METADATA_FILE", "EPOCHS", "OUTPUT_DIR", "PICTURES_DIR", "PROMPT",
           "NUM_IMAGES", "VENV",
           "CAPTION_ARGS", "TRAIN_ARGS", "INFERENCE_ARGS", "ACCELERATE_USE_CPU", "VIRTUAL_ENV", "CONDA_PREFIX",
           "MODULES", "TORCH_INDEX_URL", "TMPDIR", "model", "train_dir")  # fmt: skip

# What job.sh adds on a CPU that computes in bf16.
CPU_PRECISION = ["--mixed_precision", precision] if (precision := _cpu_precision()) else []

RECORDING_SCRIPT = """import json, os, sys
from pathlib import Path
from runtime.flags import FlagParser, positive_int

def build_parser():
    parser = FlagParser("script [flags]", "", "")
    for flag in ("--num_images", "--epochs"):
        parser.add_argument(flag, type=positive_int)
    for flag in ("--recursive", "--resume", "--wait"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--existing", "--image_dir", "--metadata_file", "--model", "--output", "--output_dir", "--prompt",
                 "--pretrained_model_name_or_path"):
        parser.add_argument(flag)
    for flag in ("--dataset", "--mixed_precision", "--negative_prompt", "--seed", "--steps", "--validation_prompts"):
        parser.add_argument(flag, nargs="+")
    return parser

def parse_args(argv):
    return build_parser().parse_args(argv)

if __name__ == "__main__":
    name = Path(sys.argv[0]).stem
    with open(os.environ["JOB_LOG"], "a") as log:
        print(json.dumps([name, *sys.argv[1:]]), file=log)
    if name == "train_text_to_image":
        Path(os.environ["TEXT_TO_IMAGE_STATUS"]).write_text(os.environ["FAKE_STATUS"])
    sys.exit(int(os.environ.get("EXIT_" + name, 0)))
"""

FAKE_TORCH = """import os, types
def __getattr__(name):  # the types that devices.py names
    return type(name, (), {})
def device(kind):
    return types.SimpleNamespace(type=kind)
class cuda:
    is_available = staticmethod(lambda: 'FAKE_GPU' in os.environ)
    is_bf16_supported = staticmethod(lambda including_emulation: os.environ['FAKE_GPU'] == 'bf16')
"""

FAKE_PYTHON = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$PYTHON_LOG"
case "$*" in
    '-c import sys; print'*) echo "$FAKE_VERSION" ;;
    '-c import venv'*) exit "${FAKE_VENV_MISSING:-0}" ;;
    '--version') echo "Python $FAKE_VERSION.0" ;;
    '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/has_pip" ;;
    '-m pip --version') [[ -e "${0%/bin/python}/has_pip" ]] ;;
    '-m pip install'*) sleep "${FAKE_PIP_SECONDS:-0}"; exit "${FAKE_PIP_FAILS:-0}" ;;
esac
"""
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "find", "flock", "mkdir", "rm", "sleep", "touch")


def environment(**changes: object) -> dict[str, str]:
    """This process's, without what would steer job.sh, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES and not name.startswith("SLURM")}
    return {**kept, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in changes.items()}}


def run(*command: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, **settings)


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_dataset(folder: Path, *captions: str) -> None:
    folder.mkdir()
    rows = [{"file_name": f"{number}.jpg", "text": caption} for number, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        (folder / row["file_name"]).write_text("a picture")


def status(state: str = "finished", model: str = "/runs/my model", step: int = 9, processes: int = 1) -> str:
    """A training run's status file."""
    return json.dumps({"model": model, "num_processes": processes, "step": step, "steps": 9, "state": state})


def make_repository(folder: Path) -> Path:
    """A copy, with a space in its path, whose three scripts record how they were called."""
    repository = folder / "my repository"
    shutil.copytree(ROOT / "text_to_image", repository / "text_to_image", ignore=shutil.ignore_patterns("starter"))
    for name in ("job.sh", "requirements.txt"):
        shutil.copy(ROOT / name, repository)
    for name in ("img_captioning", "train_text_to_image", "inference"):
        (repository / "text_to_image" / f"{name}.py").write_text(RECORDING_SCRIPT)
    make_dataset(repository / "dataset", "A pair of jeans. It is blue.", "A pair of jeans. It is black.")
    return repository


class FakeJob:
    """job.sh with recording scripts, a Python of its own, and a torch that has a GPU only where FAKE_GPU is set."""

    def __init__(self, folder: Path):
        self.folder, self.repository = folder, make_repository(folder)
        self.log = folder / "job.log"
        write_executable(folder / "venv" / "bin" / "python", f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
        (folder / "fakes").mkdir()
        (folder / "fakes" / "torch.py").write_text(FAKE_TORCH)

    def environment(self, **changes: object) -> dict[str, str]:
        own = {"VENV": self.folder / "venv", "PYTHONPATH": self.folder / "fakes", "JOB_LOG": self.log,
               "FAKE_STATUS": status()}  # fmt: skip
        return environment(**{**own, **changes})

    def __call__(
        self, script: Path | None = None, cwd: Path | None = None, arguments: Sequence[str] = (),
        shell: str | Path = "bash", **changes: object,
    ) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:  # fmt: skip
        """What became of it, and the flags of each script that it called."""
        self.log.write_text("")
        command = [shell, script or self.repository / "job.sh", *arguments]
        done = run(*command, cwd=cwd or self.folder, env=self.environment(**changes))
        return done, {name: flags for name, *flags in map(json.loads, self.log.read_text().splitlines())}


class FakeMachine:
    """A machine that has a few tools, and the Pythons that `install_pythons` puts there."""

    def __init__(self, folder: Path):
        self.repository = make_repository(folder)
        self.venv = self.repository / ".venv"
        self.tools, self._log = folder / "bin", folder / "python.log"
        self.tools.mkdir()
        self._log.touch()
        for name in TOOLS:
            (self.tools / name).symlink_to(shutil.which(name))

    def install_pythons(self, *names: str) -> None:
        for name in names:
            write_executable(self.tools / name, FAKE_PYTHON)

    def environment(self, **changes: object) -> dict[str, str]:
        return environment(**{"PATH": self.tools, "PYTHON_LOG": self._log, "FAKE_VERSION": "3.12", **changes})

    def set_up(self, **changes: object) -> subprocess.CompletedProcess:
        return run("bash", self.repository / "job.sh", "setup", env=self.environment(**changes))

    def log(self) -> str:
        """The calls of its Pythons, a line each."""
        return self._log.read_text()

    def installs(self) -> int:
        return self.log().count("-m pip install")
