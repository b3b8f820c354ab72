"""checkpoints.html in headless Chromium: on a phone and a wide screen, light and dark."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from PIL import Image

from browser import open_page
from evaluation.checkpoint_scores import CheckpointScore
from evaluation.checkpoints_report import Comparison, report
from generation.output_files import save_generated_image, write_image_rows
from planned_image import planned_image

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>\u202e ' + "W" * 800
NAMES = ["checkpoint-500", "checkpoint-1000", "checkpoint-1500", "checkpoint-2000", "checkpoint-2500", "result"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "a #folder? 100%"
    folder.mkdir()
    plan = [
        replace(planned_image(prompt, seed, model_hash=name), checkpoint=name)
        for name in NAMES for prompt in (HOSTILE, "denim jeans") for seed in (0, 1)
    ]  # fmt: skip
    picture = Image.linear_gradient("L").convert("RGB").resize((32, 48))
    files = {image: save_generated_image(picture, folder, image).name for image in plan}
    write_image_rows(folder, files)
    rows = [{"file_name": name, "nearest": HOSTILE[:60], "distance": 0.5, "copy": i % 2 == 0}
            for i, name in enumerate(files.values())]  # fmt: skip
    (folder / "copies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [CheckpointScore(name, 0.1 + i / 100, 0.4, i, 0.5, 0.6, 0.2) for i, name in enumerate(NAMES)]
    copies = Namespace(scale=Namespace(limit=0.06, is_inconclusive=True))
    report(Namespace(output_dir=folder), Comparison([Namespace(name=HOSTILE[:80])], scores, files, copies))
    return folder / "checkpoints.html"


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_the_page_reads_well_and_nothing_in_it_runs(page, width, dark):
    found = open_page(page, width, dark, page.parent)
    assert (found["width"], found["dark"]) == (width, dark)
    assert (
        found["scroll_width"] <= width
        and found["outside"] == found["faint"] == found["squeezed"] == found["console"] == []
    )
    assert found["images"] == 24 and found["broken"] == 0 and not found["alerted"]
    assert page.read_text().count('class="copied"') == 12
