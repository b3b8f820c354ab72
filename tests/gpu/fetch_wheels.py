"""Fetches the wheels that tests/gpu/run.sh needs and an interpreter without internet lacks.

python tests/gpu/fetch_wheels.py wheels                           what this interpreter lacks
python tests/gpu/fetch_wheels.py wheels --list pip_list.json --python_version 3.12
                                                                  for another machine: `pip list --format json` of it

Large ones (torch, transformers, …) are never fetched, only named. The wheels are also unpacked into wheels/packages:
PYTHONPATH=wheels/packages bash tests/gpu/run.sh OUT
"""

import argparse
import json
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("torch", "torchvision", "transformers", "triton", "nvidia-", "cuda-", "pyarrow", "pandas")  # never fetched
NOT_NEEDED = ("scikit-image",)  # measured groups do not use it
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found, large = fetch_missing(args, installed_packages(args))
    unpack(found.values(), args.folder / "packages")
    size = sum(wheel.stat().st_size for wheel in found.values()) / 1e6
    print(f"{len(found)} wheels, {size:.0f} MB: {', '.join(sorted(found)) or 'nothing is missing'}")
    if large:
        print(f"missing and too large to carry: {', '.join(large)}")
    print(f"PYTHONPATH={args.folder / 'packages'} bash tests/gpu/run.sh OUT")


def installed_packages(args: argparse.Namespace) -> set[str]:
    """The names of what the interpreter has."""
    command = [args.interpreter, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    text = args.list.read_text() if args.list else subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return {canonicalize_name(package["name"]) for package in json.loads(text)}


def fetch_missing(args: argparse.Namespace, installed: set[str]) -> tuple[dict[str, Path], list[str]]:
    """The wheels by name, with those that they need themselves; and the names of large ones that are missing."""
    waiting = [Requirement(line) for line in requirement_lines()]
    found: dict[str, Path] = {}
    large: list[str] = []
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in installed or name in found or name in large:
            continue
        if name.startswith(LARGE):
            large.append(name)
            continue
        found[name] = fetch(requirement, args)
        waiting += needs_of(found[name], args.python_version)
    return found, large


def requirement_lines() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith(NOT_NEEDED)]


def fetch(requirement: Requirement, args: argparse.Namespace) -> Path:
    """The wheel of a package; what is published as source alone is built, if that gives one for every Python."""
    wanted = f"{requirement.name}{requirement.specifier}"
    target = args.folder / canonicalize_name(requirement.name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    download = ["download", "--no-deps", "--only-binary=:all:", "--python-version", args.python_version, *platforms]
    if subprocess.run([*pip, *download, "--dest", target, wanted], stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", target, wanted], check=True)
        if not next(target.glob("*.whl")).name.endswith("none-any.whl"):
            sys.exit(f"{wanted}: there is no wheel for Python {args.python_version}")
    return max(target.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def needs_of(wheel: Path, python_version: str) -> list[Requirement]:
    """What the wheel requires there, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    environment = {**default_environment(), "python_version": python_version, "extra": ""}
    environment |= {"python_full_version": f"{python_version}.0", "sys_platform": "linux"}
    requirements = map(Requirement, lines)
    return [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]


def unpack(wheels, folder: Path) -> None:
    """An import from a zip file would not find compiled modules."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--interpreter", default=sys.executable, help="whose packages are looked at (this one)")
    parser.add_argument("--list", type=Path, metavar="FILE", help="`pip list --format json` of it instead")
    parser.add_argument("--python_version", default="{}.{}".format(*sys.version_info), help="its version (this one's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
