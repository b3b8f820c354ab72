"""The READMEs: short enough, and every command, flag, link, file and function that they name is there."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from clone import ROOT, changes, make_clone, repository_files
from generation.foreign_prompts import KOHYA_OPTIONS, WEBUI_OPTIONS

CODE = ROOT / "text_to_image"
READMES = [path for path in repository_files() if path.name == "README.md"]
MOST_LINES, MOST_WORDS = 180, 2000  # of the first README
ENTRY_POINTS = sorted(path.stem for path in CODE.glob("*.py"))
# The READMEs' commands run here on the smallest scale; those of the other two scripts need a result, and are not run.
SMALLEST = {
    "img_captioning": [],
    "train_text_to_image": ["--max_train_steps", "2", "--prior_images", "1"],
    "inference": ["--num_images", "1", "--steps", "2"],
}
JOB_STEPS = {"setup", "captions"}
SHELL_WORDS = {"cd", "export", "source", "tail", "scancel", "scontrol", "squeue", "sinfo", "git", "module", "pip"}
CHECKERS = {"ruff", "mypy", "pytest", "pre-commit"}
NEW_FLAGS = {"--debiased_loss"}  # what text_to_image/README.md adds as an example
PROMPT_OPTIONS = {f"--{option}" for option in (*KOHYA_OPTIONS, *WEBUI_OPTIONS)}  # of lines in a prompts file
SLURM_FLAGS = {
    "--account", "--array", "--chdir", "--constraint", "--cpus-per-task", "--dependency", "--exclude", "--export",
    "--gpus-per-node", "--gres", "--job-name", "--mail-type", "--mail-user", "--mem", "--nodes", "--ntasks-per-node",
    "--open-mode", "--output", "--partition", "--qos", "--requeue", "--signal", "--time",
}  # fmt: skip


# --- the first README -----------------------------------------------------------------------------------------------


def test_the_first_readme_can_be_read_in_some_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


def test_the_first_readme_shows_the_commands_of_a_first_visit():
    commands = commands_of((ROOT / "README.md").read_text())
    assert {"bash job.sh", "bash tests/run.sh", "sbatch job.sh"} <= {" ".join(command.words) for command in commands}
    assert {command.script for command in commands} >= set(SMALLEST)


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command of a README: the assignments before it, and its words."""

    environment: dict[str, str]
    words: list[str]

    @property
    def file(self) -> str | None:
        """The Python file or shell script that it starts."""
        return next((word for word in self.words if word.endswith((".py", ".sh"))), None)

    @property
    def script(self) -> str | None:
        """Which of the entry points it starts."""
        path = Path(self.file or "")
        return path.stem if path.parent.name == CODE.name and path.stem in ENTRY_POINTS else None

    @property
    def arguments(self) -> list[str]:
        """The words after the file that it starts."""
        return self.words[self.words.index(self.file) + 1 :] if self.file else self.words[1:]

    @property
    def variables(self) -> set[str]:
        """What it sets in the environment."""
        exported = self.arguments if self.words[0] == "export" else []
        return {*self.environment, *(word.partition("=")[0] for word in exported)}

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


@functools.cache
def flags_of(path: Path) -> frozenset[str]:
    """The flags of a Python file: of an entry point by its help, of any other by its source."""
    if path.parent == CODE:
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
        return frozenset(flags_in(done.stdout))
    return frozenset(re.findall(r"\"(--[a-z_]+)\"", path.read_text()))


def unknown_flags(text: str) -> list[str]:
    """'file: flag' of each flag in a Markdown text that nothing has: neither the file of its command, nor any file."""
    commands, unknown = commands_of(text), []
    for command in commands:
        expected = {
            "text_to_image/train_text_to_image.py": command.environment.get("TRAIN_ARGS", ""),
            "text_to_image/inference.py": command.environment.get("INFERENCE_ARGS", ""),
        }
        if command.file and command.file.endswith(".py"):
            expected[command.file] = " ".join(command.arguments)
        for name, words in expected.items():
            unknown += [f"{name}: {flag}" for flag in flags_in(words) - flags_of(ROOT / name)]
    scripts = [*CODE.glob("*.py"), *CODE.glob("starter/*.py"), *ROOT.glob("tests/benchmarks/*.py")]
    of_others = {flag for command in commands if not command.script for flag in flags_in(" ".join(command.words))}
    anywhere = set().union(
        *map(flags_of, scripts), SLURM_FLAGS, PROMPT_OPTIONS, NEW_FLAGS, of_others, {"--all", "--help"}
    )
    return unknown + [f"any script: {flag}" for flag in sorted(flags_in(text) - anywhere)]


def what_is_wrong_with(command: Command) -> str | None:
    """Why a command could not be run as it stands by somebody who has the repository; None where nothing is wrong."""
    program, known = command.words[0], job_variables()
    if program not in {"bash", "sbatch", "python", "accelerate", *SHELL_WORDS, *CHECKERS}:
        return f"{program} is no program that READMEs use"
    if command.file and not (ROOT / command.file.removeprefix("REPO/")).is_file():
        return f"there is no {command.file}"
    if command.file == "job.sh" and command.arguments and set(command.arguments) - JOB_STEPS:
        return f"job.sh takes {', '.join(sorted(JOB_STEPS))} or nothing"
    if program == "sbatch" and (wrong := flags_in(str(command)) - flags_in(str(command.environment)) - SLURM_FLAGS):
        return f"sbatch has no {wrong}"
    if program in ("bash", "sbatch", "export") and (wrong := command.variables - known):
        return f"job.sh reads no {wrong}"
    return None


@functools.cache
def job_variables() -> frozenset[str]:
    """The variables that job.sh and what it sources read, and those of the libraries and of Slurm."""
    sources = [ROOT / "job.sh", ROOT / "tests" / "run.sh", *CODE.glob("slurm/*.sh")]
    read = {name for path in sources for name in re.findall(r"\$\{?!?([A-Z][A-Z_]+)", path.read_text())}
    read |= {name for path in sources for name in re.findall(r"read_words ([A-Z_]+)", path.read_text())}
    return frozenset(read | {"HF_HOME", "HF_HUB_OFFLINE", "ACCELERATE_USE_CPU"})


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
    assert [what_is_wrong_with(command) for command in commands] == [None] * 4
    assert unknown_flags(text) == []
    wrong = text.replace("--seed", "--sed").replace("--prompt", "--image_dir")
    assert unknown_flags(wrong) == [
        "text_to_image/inference.py: --image_dir",
        "text_to_image/train_text_to_image.py: --sed",
        "any script: --sed",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "rm -rf output",
        "bash job.sh captoins",
        "MODLE=x bash job.sh",
        "python tests/benchmarks/none.py",
        "sbatch --tim=1 job.sh",
    ],
)
def test_a_command_that_does_not_work_is_found(line):
    (command,) = commands_of(f"```bash\n{line}\n```")
    assert what_is_wrong_with(command)


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_flag_that_a_readme_names_exists(readme):
    assert unknown_flags((ROOT / readme).read_text()) == []


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_command_of_a_readme_is_one_that_works(readme):
    commands = commands_of((ROOT / readme).read_text())
    assert {str(command): wrong for command in commands if (wrong := what_is_wrong_with(command))} == {}


def can_run_here(command: Command) -> bool:
    """Starts one of three scripts, and needs no model hub and no file that the repository does not have."""
    if command.script not in SMALLEST or command.words[0] != "python" or "--push_to_hub" in command.words:
        return False
    paths = [word for word in command.arguments if "/" in word or word in {"dataset", "Generated_sample"}]
    before = dict(zip(command.arguments[1:], command.arguments, strict=False))
    there = [word for word in paths if not word.startswith("output/") or before.get(word) == "--model"]
    return all((ROOT / path).exists() for path in there) and not any("~" in word for word in command.words)


def runnable_commands() -> list[Command]:
    """Each one once, in whatever README it stands."""
    commands = [command for readme in READMES for command in commands_of((ROOT / readme).read_text())]
    return list({str(command): command for command in commands if can_run_here(command)}.values())


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clones") / "a clone")


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable_commands(), ids=str)
def test_a_command_of_a_readme_runs_and_leaves_git_clean(command, clone):
    words = [sys.executable, *command.words[1:], *SMALLEST[command.script]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert changes(clone) == ""


# --- links, files and names -----------------------------------------------------------------------------------------


def links_in(text: str) -> list[str]:
    """The links of a Markdown text that lead to a place in the repository."""
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)|src=\"([^\"]+)\"", text)
    return [link for pair in found for link in pair if link and "://" not in link]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_link_of_a_readme_leads_somewhere(readme):
    broken = []
    for link in links_in((ROOT / readme).read_text()):
        name, _, anchor = link.partition("#")
        target = (ROOT / readme).parent / name if name else ROOT / readme
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_every_file_and_function_that_a_readme_names_exists(readme):
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / readme).read_text(), flags=re.DOTALL | re.MULTILINE)
    sources = "\n".join(path.read_text() for path in repository_paths(".py"))
    functions = set(re.findall(r"`(\w+)\(\)`", text))
    assert [name for name in sorted(functions) if not re.search(rf"^ *def {name}\(", sources, re.MULTILINE)] == []
    files = set(re.findall(r"`([\w./-]+\.(?:py|sh))`", text))
    places = [(ROOT / readme).parent, ROOT, CODE]
    assert [name for name in sorted(files) if not any((place / name).is_file() for place in places)] == []


def repository_paths(suffix: str) -> list[Path]:
    return [ROOT / path for path in repository_files() if path.suffix == suffix]


# --- what other programs read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_python_and_json_in_a_readme_are_python_and_json(readme):
    text = (ROOT / readme).read_text()
    for indent, language, block in re.findall(r"^( *)```(python|json)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        if language == "python":
            compile("\n".join(lines), str(readme), "exec")
        else:
            assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize("readme", ["dataset", "text_to_image/starter/base", "text_to_image/starter/captioner"])
def test_the_front_matter_of_a_card_is_read(readme):
    text = (ROOT / readme / "README.md").read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert front["license"] == "mit"


def test_the_pictures_that_readmes_show_are_not_taken_for_generated_ones(tmp_path):
    for path in repository_files():
        if path.parent.name == "Generated_sample":
            shutil.copy(ROOT / path, tmp_path)
    assert list(tmp_path.glob("*.jpg"))
    words = ["check_copies.py", "--generated", tmp_path, "--dataset", ROOT / "dataset"]
    done = subprocess.run([sys.executable, CODE / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 2 and "no pictures" in done.stderr


@pytest.mark.parametrize("words", [("imagefolder", "dataset"), ("dataset", None)], ids=["imagefolder", "folder"])
def test_datasets_reads_the_data_set(words, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(ROOT)
    split = datasets.load_dataset(words[0], data_dir=words[1], split="train", cache_dir=str(tmp_path))
    rows = [json.loads(line) for line in (ROOT / "dataset" / "metadata.jsonl").read_text().splitlines()]
    assert split["text"] == [row["text"] for row in rows]
    assert split[0]["image"].size == (768, 1024)


def test_pre_commit_runs_the_ruff_that_the_tests_run():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (pinned,) = re.findall(r"^ruff==\S+$", (ROOT / "tests" / "requirements.txt").read_text(), re.MULTILINE)
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [pinned] for hook in hooks)
