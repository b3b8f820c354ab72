"""index.html in headless Chromium: on a phone and a wide screen, light and dark; its filter and its commands."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from browser import open_page
from generation.gallery import try_write_gallery
from generation.output_files import save_generated_image, write_image_rows
from planned_image import planned_image

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>\u202e ' + "W" * 3000
PROMPTS = [HOSTILE, "a red skirt", "it's «denim» jeans", "\u0628\u0646\u0637\u0627\u0644 " * 30]

PICTURE = Image.linear_gradient("L").convert("RGB").resize((32, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of four prompts with two settings, two of them checked for copies."""
    folder = tmp_path_factory.mktemp("browser") / "a #folder? 100%"
    (folder / ".nearest").mkdir(parents=True)
    plan = [planned_image(prompt, seed, steps=9 + seed) for prompt in PROMPTS for seed in (0, 1)]
    files = {image: save_generated_image(PICTURE, folder, image).name for image in plan}
    write_image_rows(folder, files)
    PICTURE.save(folder / ".nearest" / "a.jpg")
    nearest = [
        {"file_name": name, "nearest": HOSTILE[:60], "distance": 0.5, "copy": copy, "thumbnail": ".nearest/a.jpg"}
        for name, copy in zip(files.values(), (True, False), strict=False)
    ]
    (folder / "copies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nearest))
    try_write_gallery(folder)
    return folder


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1400, False), (1400, True)])
def test_the_page_reads_well(folder, width, dark):
    found = open_page(folder / "index.html", width, dark, folder)
    assert (found["width"], found["dark"]) == (width, dark)
    assert (
        found["scroll_width"] <= width
        and found["outside"] == found["faint"] == found["squeezed"] == found["console"] == []
    )
    assert found["images"] == 10 and found["broken"] == 0 and not found["alerted"]
    assert all(request.startswith("file:") for request in found["requests"])


def test_the_filter_shows_a_prompts_pictures_and_the_button_copies_its_command(folder, tmp_path):
    page = folder / "tried.html"
    script = """<script>
        const shown = () => cards.filter(card => !card.hidden).map(card => card.dataset.seed);
        const type = (text) => { words.value = text; words.dispatchEvent(new Event("input", {bubbles: true})); };
        const found = {all: shown().length};
        type("SKIRT red"); found.skirt = shown();
        type("nothing like it"); found.none = shown();
        type(""); copiesOnly.click(); found.copies = shown(); copiesOnly.click();
        copyText = (text) => (found.command = text);
        setTimeout(() => {
          cards.find(card => card.textContent.includes("«denim»")).querySelector("button").click();
          console.log("FOUND" + encodeURIComponent(JSON.stringify(found)) + "END");
        }, 3000);
    </script></body>"""
    page.write_text((folder / "index.html").read_text().replace("</body>", script))
    [line] = open_page(page, 1400, False, folder)["console"]
    found = json.loads(unquote(re.search("FOUND(.*)END", line)[1]))
    assert (found["all"], found["skirt"], found["none"], found["copies"]) == (8, ["1", "0"], [], ["0"])
    words = shlex.split(found["command"])
    assert words[-1] == f"--prompt={PROMPTS[2]}" and words[-5:-1] == ["--num_images", "1", "--seed", "1"]
    assert words[words.index("--steps") + 1] == "10"
