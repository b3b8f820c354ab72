"""The scripts as a newcomer meets them: their help, wrong flags, a missing environment; the commands of README."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from clone import ROOT, changes, make_clone

README = ROOT / "README.md"
SCRIPTS = ("img_captioning", "train_text_to_image", "inference")
TOOLS = ("export_checkpoint", "check_copies")  # README's commands of these are not run: they need a result
# Flags of other programs that README may name: Slurm's, pip's, git's.
OTHERS_FLAGS = {
    "--account", "--array", "--chdir", "--cpus-per-task", "--gpus-per-node", "--mem", "--nodes", "--output",
    "--partition", "--time",
}  # fmt: skip
# README's commands do their work here on the smallest scale.
SMALLEST = {
    "img_captioning": [],
    "train_text_to_image": ["--max_train_steps", "2", "--prior_images", "1"],
    "inference": ["--num_images", "1", "--steps", "2"],
}


def python(*arguments: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **settings)


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(script: str) -> str:
    return python(ROOT / "text_to_image" / f"{script}.py", "--help", env={**os.environ, "COLUMNS": "80"}).stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_fits_80_columns_and_says_how_to_begin(script):
    text = help_of(script)
    assert max(map(len, text.splitlines())) <= 80
    assert f"python text_to_image/{script}.py" in text


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_help_and_wrong_flags_are_answered_before_a_heavy_library_is_imported(script):
    """What makes `--help` answer at once: PyTorch alone takes seconds."""
    for flag in ("--help", "--no_such_flag"):
        done = python("-X", "importtime", ROOT / "text_to_image" / f"{script}.py", flag)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "runtime.flags" in imported and not imported & {"torch", "numpy", "PIL", "diffusers", "transformers"}


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_a_misspelt_flag_is_refused_in_one_line(script):
    done = python(ROOT / "text_to_image" / f"{script}.py", "--no_such_flag")
    assert done.returncode == 2
    assert "--no_such_flag" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", [*SCRIPTS, *TOOLS])
def test_outside_the_environment_the_line_that_helps_is_printed(script, tmp_path):
    shutil.copytree(ROOT / "text_to_image", tmp_path / "scripts", ignore=shutil.ignore_patterns("starter", "*.txt"))
    (tmp_path / "scripts" / "starter" / "base").mkdir(parents=True)
    (tmp_path / "scripts" / "starter" / "captioner").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.png").write_bytes(b"a picture")
    needed = {
        "img_captioning": ["--image_dir", tmp_path / "data"],
        "train_text_to_image": ["--dataset", tmp_path / "data"],
        "inference": ["--prompt", "x"],
        "export_checkpoint": ["--model", tmp_path, "--to", tmp_path / "model.safetensors"],
        "check_copies": [],
    }
    # -S leaves out the environment's site-packages.
    done = python("-S", tmp_path / "scripts" / f"{script}.py", *needed[script])
    assert done.returncode == 2
    assert "torch" in done.stderr and "bash job.sh setup" in done.stderr and len(done.stderr.splitlines()) == 1


# --- README ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command of README: the assignments before it, and its words."""

    environment: dict[str, str]
    words: list[str]

    @property
    def script(self) -> str | None:
        """Which of the scripts it starts."""
        names = [Path(word).stem for word in self.words if word.startswith("text_to_image/") and word.endswith(".py")]
        return names[0] if names and names[0] in (*SCRIPTS, *TOOLS) else None

    @property
    def script_words(self) -> list[str]:
        """What stands behind the script's name."""
        return self.words[self.words.index(f"text_to_image/{self.script}.py") + 1 :] if self.script else []

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.words])


def commands_of(text: str) -> list[Command]:
    """The commands in the fenced shell blocks of a Markdown text: no comments, outputs or other languages."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        for part in re.split(r"\s&&\s", line.strip().removeprefix("$ ")):
            words = shlex.split(part, comments=True)
            environment = {}
            while words and re.match(r"[A-Z_]+=", words[0]):
                name, value = words.pop(0).split("=", 1)
                environment[name] = value
            if words and words != ["…"]:
                commands.append(Command(environment, words))
    return commands


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def unknown_flags(text: str) -> list[str]:
    """'script: flag' of each flag in a Markdown text that nothing in the repository has."""
    known = {script: flags_in(help_of(script)) for script in (*SCRIPTS, *TOOLS)}
    unknown = []
    for command in commands_of(text):
        expected = {
            "train_text_to_image": command.environment.get("TRAIN_ARGS", ""),
            "inference": command.environment.get("INFERENCE_ARGS", ""),
        }
        if command.script:
            expected[command.script] = " ".join(command.script_words)
        unknown += [f"{name}: {flag}" for name, words in expected.items() for flag in flags_in(words) - known[name]]
    shell_words = {
        flag for command in commands_of(text) if not command.script for flag in flags_in(" ".join(command.words))
    }
    anywhere = set().union(*known.values(), OTHERS_FLAGS, shell_words, flags_of_other_scripts())
    return unknown + [f"any script: {flag}" for flag in sorted(flags_in(text) - anywhere)]


def flags_of_other_scripts() -> set[str]:
    """The flags of the scripts in starter/ and tests/benchmarks/, read from their sources."""
    sources = [*ROOT.glob("text_to_image/starter/*.py"), *ROOT.glob("tests/benchmarks/*.py")]
    return {flag for path in sources for flag in re.findall(r"\"(--[a-z_]+)\"", path.read_text())}


def can_run_here(command: Command) -> bool:
    """Starts one of the three scripts, and needs no model hub and no file that the repository does not have."""
    if command.script not in SCRIPTS or command.words[0] != "python" or "--push_to_hub" in command.words:
        return False
    paths = [word for word in command.script_words if "/" in word or word in {"dataset", "Generated_sample"}]
    return all((ROOT / path).exists() for path in paths) and not any("~" in word for word in command.words)


def test_commands_are_found_in_markdown():
    text = """
Run `python text_to_image/inference.py --seed 3`:

```bash
git clone https://example.org/x && cd x
$ python text_to_image/inference.py \\
    --prompt "denim jeans"   # a comment
TRAIN_ARGS='--seed 7' sbatch job.sh
```

```text
python text_to_image/inference.py
```
"""
    commands = commands_of(text)
    assert [command.words for command in commands] == [
        ["git", "clone", "https://example.org/x"],
        ["cd", "x"],
        ["python", "text_to_image/inference.py", "--prompt", "denim jeans"],
        ["sbatch", "job.sh"],
    ]
    assert commands[3].environment == {"TRAIN_ARGS": "--seed 7"}
    assert [can_run_here(command) for command in commands] == [False, False, True, False]
    assert unknown_flags(text) == []
    wrong = text.replace("--seed", "--sed").replace("--prompt", "--image_dir")
    assert unknown_flags(wrong) == ["inference: --image_dir", "train_text_to_image: --sed", "any script: --sed"]


readme_exists = pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")
README_COMMANDS = commands_of(README.read_text()) if README.exists() else []


@readme_exists
def test_every_flag_that_readme_names_exists():
    assert unknown_flags(README.read_text()) == []


@readme_exists
def test_readme_shows_the_commands_of_a_first_visit():
    shown = {" ".join(command.words) for command in README_COMMANDS}
    assert {"bash job.sh", "bash tests/run.sh", "sbatch job.sh"} <= shown
    assert {command.script for command in README_COMMANDS} >= set(SCRIPTS)


@readme_exists
def test_every_file_that_readme_links_exists():
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", README.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clones") / "a clone")


@readme_exists
@pytest.mark.parametrize("command", [command for command in README_COMMANDS if can_run_here(command)], ids=str)
def test_a_command_of_readme_runs_and_leaves_git_clean(command, clone):
    words = [*command.words[1:], *SMALLEST[command.script]]
    done = python(*words, cwd=clone, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert changes(clone) == ""
