"""Fetches freely licensed photographs from packages and cuts them into squares, for the training of the starter's VAE.

python fetch_photos.py --to /scratch/photos       about 1,300 JPEGs of 256 px, 30 MB

Needs apt-get and dpkg-deb (Debian, Ubuntu) for the wallpapers, and scikit-image for its pictures; what is missing is
left out. README.md names each package with its licence. No photograph is part of this repository.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 256  # px of a square
# Photographs alone: most wallpapers are drawings, with large even areas and no texture.
WALLPAPERS = {
    "lomiri-wallpapers-16.04": (
        "Picture_1A", "Picture_0B", "Wine", "greentock", "seeding", "aitzgorri", "Dragonfly", "friends", "sunset",
        "free", "picosdeeuropa", "life", "Bridge",
    ),
    "lomiri-wallpapers-20.04": ("Kleiber",),
    "mate-backgrounds": (
        "Garden", "Dune", "Wood", "Aqua", "TwoWings", "Storm", "GreenMeadow", "RainDrops", "Blinds", "FreshFlower",
        "LadyBird", "YellowFlower", "Elephants_3840x2160",
    ),
    "plasma-workspace-wallpapers": (
        "FallenLeaf", "DarkestHour", "summer_1am", "EveningGlow", "Grey", "Kite", "ColorfulCups", "OneStandsOut",
        "ColdRipple", "BytheWater", "Autumn", "SafeLanding",
    ),
}  # fmt: skip
SCIKIT_IMAGE = (
    "coffee.png", "camera.png", "astronaut.png", "gravel.png", "brick.png", "motorcycle_left.png", "grass.png",
    "rocket.jpg", "chelsea.png", "coins.png",
)  # fmt: skip


def wallpaper_files(folder: Path) -> list[Path]:
    """The photographs of WALLPAPERS, unpacked into `folder`, the largest version of each."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        print("no apt-get here: the wallpapers are left out", file=sys.stderr)
        return []
    found = []
    for package, names in WALLPAPERS.items():
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        files = [p for p in sorted((folder / package).rglob("*")) if _is_picture(p)]
        for name in names:
            versions = [p for p in files if p.name.startswith(name) or name in p.parts]
            found.append(max(versions, key=lambda p: p.stat().st_size))
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file() and "screenshot" not in path.name


def scikit_image_files() -> list[Path]:
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        print("no scikit-image here (pip install scikit-image): its pictures are left out", file=sys.stderr)
        return []
    files = [Path(spec.origin).parent / "data" / name for name in SCIKIT_IMAGE]
    return [path for path in files if path.exists()]


def random_square(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of SIDE px from the photograph at a random size, often nearly the whole of it."""
    shortest = min(photo.size)
    size = SIDE * min(max(shortest / SIDE, 1), 6) ** rng.uniform(0, 1) ** 1.5
    scaled = photo.resize([max(round(s * size / shortest), SIDE) for s in photo.size], Image.Resampling.LANCZOS)
    x, y = (int(rng.integers(s - SIDE + 1)) for s in scaled.size)
    return scaled.crop((x, y, x + SIDE, y + SIDE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write the squares into")
    parser.add_argument("--count", type=int, default=1300, help="number of squares over all photographs")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        files = wallpaper_files(Path(temporary)) + scikit_image_files()
        if not files:
            sys.exit("no photographs found: neither apt-get nor scikit-image is here")
        for number, path in enumerate(files):
            photo = Image.open(path).convert("RGB")
            photo.thumbnail((2600, 2600), Image.Resampling.LANCZOS)
            for i in range(number, args.count, len(files)):
                square = random_square(photo, np.random.default_rng([i, 16]))
                square.save(args.to / f"{i:04d}.jpg", quality=args.quality)
    size = sum(p.stat().st_size for p in args.to.glob("*.jpg")) / 1e6
    print(f"{args.count} squares from {len(files)} photographs in {args.to}, {size:.1f} MB")


if __name__ == "__main__":
    main()
