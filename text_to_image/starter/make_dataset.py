"""Renders the reference data set: three portrait pictures of denim jeans with their captions.

python make_dataset.py --to ../../dataset
"""

import argparse
import json
from pathlib import Path

from render_garments import Spec, render

WIDTH, HEIGHT = 768, 1024


def jeans(view: str, fold: str, seed: int) -> Spec:
    return Spec("jeans", "blue", "plain", None, view, fold, "upper right", seed)


PICTURES = {
    "11 (1).JPG": (
        jeans("front", "flat", 1),
        "A single pair of denim jeans laid flat on a white background, seen from the front. The mid-blue denim is "
        "faded on the thighs and knees and darker along the seams. A copper button closes the waistband, four belt "
        "loops stand above it, and two curved front pockets and the fly are sewn with orange thread. Both legs lie "
        "straight and slightly apart, with soft creases and plain hems. A small black square reference marker is near "
        "the upper right corner.",
    ),
    "11 (2).JPG": (
        jeans("front", "knee", 2),
        "A single pair of denim jeans laid flat on a white background, seen from the front, with one leg folded up at "
        "the knee. The folded leg shows the darker back of the cloth and its hem with orange stitching, the other leg "
        "lies straight. The blue denim is faded on the thighs, and a copper button, the fly and two curved front "
        "pockets can be seen below the waistband with its belt loops. A small black square reference marker is near "
        "the upper right corner.",
    ),
    "11 (3).JPG": (
        jeans("back", "flat", 7),
        "A single pair of denim jeans laid flat on a white background, seen from the back. The blue denim is slightly "
        "faded, two back pockets with orange stitching sit below the yoke, and the back rise is clearly visible "
        "between them. The legs are spread apart and show natural creases. A small black square reference marker is "
        "near the upper right corner.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--to", type=Path, required=True, help="folder to write the three pictures and metadata.jsonl into"
    )
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for name, (spec, _) in PICTURES.items():
        render(spec, WIDTH, HEIGHT, supersample=3).save(args.to / name, "JPEG", quality=93)
    rows = [json.dumps({"file_name": name, "text": text}) for name, (_, text) in PICTURES.items()]
    (args.to / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
