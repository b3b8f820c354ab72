"""The layout: what lies where, how large it may grow, and which folder may import which."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clone import ROOT, repository_files

CODE = ROOT / "text_to_image"
TOP = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "job.sh", "dataset", "Generated_sample",
       "text_to_image", "tests"}  # fmt: skip
ENTRY_POINTS = {"img_captioning", "train_text_to_image", "inference", "export_checkpoint", "check_copies"}
# A folder imports from lower layers and from itself. Only the entry points import `training`.
LAYERS = (("runtime",), ("metadata",), ("data", "models"), ("bases",), ("runs", "captioning", "optimization"),
          ("reporting",), ("training", "generation"), ("exporting", "evaluation"))  # fmt: skip
LAYER = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
# What job.sh calls may use the entry points; the scripts that made the small models are apart.
OTHER_FOLDERS = {"slurm", "starter"}
LIBRARIES = {"PIL", "accelerate", "datasets", "diffusers", "huggingface_hub", "imagehash", "jinja2", "matplotlib",
             "numpy", "peft", "safetensors", "tokenizers", "torch", "torchvision", "tqdm", "transformers"}  # fmt: skip
MOST_LINES, MOST_MODULES = 400, 16


def modules() -> list[Path]:
    """The Python files of the folders, without starter/."""
    found = [path for path in sorted(CODE.glob("*/*.py")) if path.parent.name != "starter"]
    assert len(found) > 40
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules that a file names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module if not node.level else f"{path.parent.name}.{node.module or ''}"


def wrong_imports(folder: str, imported: str) -> bool:
    """Whether a module of `folder` may not import the module `imported`."""
    other = imported.split(".")[0]
    if other == folder:
        return False
    if folder == "slurm":
        return other == "training"
    return other in ENTRY_POINTS | OTHER_FOLDERS or (
        other in LAYER and (LAYER[other] >= LAYER[folder] or other == "training")
    )


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(CODE)} imports {name}"
        for path in modules()
        for name in imports(path)
        if wrong_imports(path.parent.name, name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("folder", "imported", "wrong"),
    [
        ("data", "runtime.errors", False),
        ("data", "models.folders", True),
        ("runtime", "data", True),
        ("generation", "training.plan", True),
        ("exporting", "training.plan", True),
        ("exporting", "generation.weights", False),
        ("slurm", "inference", False),
        ("slurm", "training.plan", True),
        ("runs", "inference", True),
        ("training", "training.plan", False),
        ("data", "numpy.random", False),
    ],
)
def test_the_rule_of_imports_is_the_one_in_the_table(folder, imported, wrong):
    assert wrong_imports(folder, imported) is wrong


def test_nothing_else_is_at_the_top():
    top = {path.parts[0] for path in repository_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_text_to_image_shows_the_five_scripts_and_the_folders_they_are_made_of():
    files = [path for path in repository_files() if path.parts[0] == "text_to_image"]
    assert {path.stem for path in files if path.suffix == ".py" and len(path.parts) == 2} == ENTRY_POINTS
    assert {path.parts[1] for path in files if len(path.parts) > 2} <= LAYER.keys() | OTHER_FOLDERS
    deeper = [path for path in files if len(path.parts) > 3 and path.parts[1] != "starter"]
    assert deeper == []


def test_every_folder_of_tests_mirrors_one_of_the_code():
    folders = {path.parts[1] for path in repository_files() if path.parts[0] == "tests" and len(path.parts) > 2}
    assert folders <= {path.name for path in CODE.iterdir()} | {"benchmarks", "gpu"}


def test_no_file_and_no_folder_grows_too_large():
    shell_and_python = [p for p in repository_files() if p.suffix in (".py", ".sh") and "starter" not in p.parts]
    lines = {path: (ROOT / path).read_text().count("\n") for path in shell_and_python}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}
    counts = {folder: len(list((CODE / folder).glob("[!_]*.py"))) for folder in LAYER}
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("folder", sorted(LAYER.keys() | OTHER_FOLDERS))
def test_a_folder_says_in_one_sentence_what_it_holds(folder):
    [only] = ast.parse((CODE / folder / "__init__.py").read_text()).body
    sentence = only.value.value
    assert sentence[-1] in ".?" and not re.search(r"[.!?]\s", sentence)


def test_no_name_hides_a_library_or_says_nothing():
    names = {path.stem for path in modules() if path.stem != "__init__"} | {*LAYER, *OTHER_FOLDERS, *ENTRY_POINTS}
    taken = LIBRARIES | sys.stdlib_module_names | {"utils", "helpers", "common"}
    assert names & taken == set()


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def test_no_function_takes_more_than_six_parameters():
    """What belongs together is bundled in a dataclass."""
    found = [
        f"{path.relative_to(CODE)}: {function.name}"
        for path in [*modules(), *CODE.glob("*.py")]
        for function in functions(path)
        if len([a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")]) > 6
    ]
    assert found == []


def test_training_stays_on_one_screen():
    [train] = [function for function in functions(CODE / "training" / "train.py") if function.name == "train"]
    assert train.end_lineno - train.lineno + 1 <= 70
    assert any(isinstance(node, ast.For) for node in ast.walk(train))


def test_no_file_is_large_and_none_holds_a_secret_or_a_home_folder():
    for path in repository_files():
        content = (ROOT / path).read_bytes()
        assert len(content) <= 20 << 20, f"{path} is too large for a repository"
        found = re.search(rb"hf_[A-Za-z0-9]{30,}|/(?:root|home/(?!user/)[a-z]+)/|^<<<<<<< ", content, re.MULTILINE)
        assert path == Path(__file__).relative_to(ROOT) or not found or b"\0" in content, f"{path}: {found}"
