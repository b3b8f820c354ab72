"""index.html shows every generated picture that is there, with what it takes to generate it again."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import reporting.pages
from generation import gallery
from generation.gallery import command_of, settings_of, try_write_gallery
from generation.output_files import OutputWriter
from generation.planned_images import GeneratedBatch
from inference import parse_args
from planned_image import planned_image

HOSTILE = '"><script>alert(1)</script>&\u202e' + "x" * 5000


@pytest.fixture
def page_of(tmp_path):
    """`page_of(row, ...)`: the page of pictures with these rows of images.jsonl, which are there."""

    def write(*rows: dict, nearest: list[dict] | None = None) -> str:
        for row in rows:
            (tmp_path / row["file_name"]).touch()
        for name, lines in (("images.jsonl", rows), ("copies.jsonl", nearest or [])):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        try_write_gallery(tmp_path)
        return (tmp_path / "index.html").read_text()

    return write


def row_of(name: str = "", checkpoint: str | None = None, **changes) -> dict:
    planned = replace(planned_image(**changes), checkpoint=checkpoint)
    return planned.to_row(name or planned.file_name)


def test_a_picture_stands_there_with_its_file_prompt_and_seed_the_newest_prompt_first(page_of):
    rows = [row_of(prompt=prompt, seed=seed) for prompt in ("a skirt", "red jeans") for seed in (7, 8)]
    page = page_of(*rows)
    shown = re.findall(r'<img src="([^"]+)"', page)
    assert shown == [rows[i]["file_name"] for i in (2, 3, 0, 1)]
    assert page.index("red jeans</p>") < page.index("a skirt</p>") and "seed 8" in page


def test_a_picture_that_was_deleted_goes_from_the_page_and_the_page_with_the_last(page_of, tmp_path):
    rows = [row_of(seed=seed) for seed in (1, 2)]
    page_of(*rows)
    (tmp_path / rows[0]["file_name"]).unlink()
    try_write_gallery(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert rows[0]["file_name"] not in page and rows[1]["file_name"] in page
    (tmp_path / rows[1]["file_name"]).unlink()
    try_write_gallery(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_prompts_and_names_are_shown_as_text_and_links_lead_to_the_file(page_of):
    page = page_of(row_of("a#b%20'?.png", prompt=HOSTILE, model=HOSTILE, negative_prompt=HOSTILE))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert 'src="a%23b%2520%27%3F.png"' in page


def test_the_page_asks_for_nothing_but_the_pictures(page_of):
    page = page_of(row_of(), nearest=[{"file_name": row_of()["file_name"], "nearest": "1.jpg", "distance": 0.5}])
    assert re.findall(r"https?://|url\(|@import", page) == []
    sources = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert sources == {"data:,", "#settings-1", row_of()["file_name"]}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"model": "out/run/checkpoint-30/unet_ema", "checkpoint": "checkpoint-30"}, {"model": "out/run"}),
        ({"model": "out/run/checkpoint-30/unet", "checkpoint": "checkpoint-30/unet"}, {"model": "out/run"}),
        ({"model": "out/run", "checkpoint": "result", "negative_prompt": "--it's blurred"}, {"checkpoint": None}),
        (
            {"model": "out/run + checkpoint-3/pytorch_lora_weights.safetensors at 0.5", "checkpoint": "checkpoint-3"},
            {"model": "out/run", "lora": [], "lora_scale": [0.5]},
        ),
        (
            {"model": "a/base + style/x.safetensors at 2", "checkpoint": None},
            {"model": "a/base", "lora": ["style/x.safetensors"], "lora_scale": [2.0]},
        ),
    ],
)
def test_the_command_of_a_picture_asks_for_its_settings(changes, more):
    row = row_of(guidance_rescale=0.5, scheduler="euler", **changes)
    args = parse_args([*shlex.split(command_of(settings_of(row)))[2:], "--prompt", "x"])
    wanted = {"checkpoint": row["checkpoint"], "guidance_scale": row["guidance"], **more}
    same = ("steps", "scheduler", "guidance_rescale", "negative_prompt", "height", "width", "dtype")
    wanted |= {key: row[key] for key in same}
    assert {key: getattr(args, key) for key in wanted} == wanted


def test_after_a_check_each_picture_has_its_nearest_beside_it_and_only_copies_are_marked(page_of, tmp_path):
    rows = [row_of(seed=seed) for seed in (1, 2, 3)]
    (tmp_path / ".nearest").mkdir()
    (tmp_path / ".nearest" / "a.jpg").touch()
    nearest = [
        {"file_name": row["file_name"], "nearest": "11.JPG", "distance": 0.04321, "copy": copy, "thumbnail": file}
        for row, copy, file in zip(rows, (True, False), (".nearest/a.jpg", ".nearest/gone.jpg"), strict=False)
    ]
    page = page_of(*rows, nearest=nearest)
    assert "1 of 2 are copies" in page and page.count(" data-copy") == 1
    assert page.count(".nearest/a.jpg") == 1 and "gone.jpg" not in page and page.count("0.043 from") == 2


def test_a_limit_is_said_and_rows_without_settings_are_shown_too(page_of, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_PICTURES", 2)
    page = page_of(*({"file_name": f"{i}.png", "model_hash": "x"} for i in range(3)))
    assert page.count("<figure") == 2 and "newest 2 are shown" in page


def test_a_page_that_cannot_be_made_is_a_warning(page_of, monkeypatch, capsys, tmp_path):
    page_of(row_of())
    before = (tmp_path / "index.html").read_text()

    def fail(*_: object, **__: object) -> None:
        raise ImportError("No module named 'jinja2'")

    monkeypatch.setattr(reporting.pages, "write_page", fail)
    try_write_gallery(tmp_path)
    assert "index.html" in capsys.readouterr().err and (tmp_path / "index.html").read_text() == before
    (tmp_path / "copies.jsonl").write_text("{")
    try_write_gallery(tmp_path)
    assert "copies.jsonl" in capsys.readouterr().err


@pytest.fixture
def pages_written(tmp_path, monkeypatch):
    """`pages_written(seconds, batches)`: after how many batches the page was written, where each write takes
    `seconds` and a batch ten."""

    def run(seconds: float, batches: int) -> list[int]:
        now, written = [0.0], []
        monkeypatch.setattr("generation.output_files.time.monotonic", lambda: now[0])

        def write(_: Path) -> None:
            written.append(round(now[0] / 10))
            now[0] += seconds

        monkeypatch.setattr("generation.output_files.try_write_gallery", write)
        writer = OutputWriter(tmp_path, [], with_metadata=False, is_main=True)
        with writer:
            for _ in range(batches):
                now[0] += 10
                writer.add(GeneratedBatch([], [], []))
        return written

    return run


def test_a_long_run_refreshes_the_page_rarely_and_for_a_hundredth_of_its_time(pages_written):
    assert pages_written(0.0, 20) == [7, 14]
    slow = pages_written(5.0, 130)
    assert slow[0] == 7 and slow[1] - slow[0] > 50 and len(slow) == 3


def test_a_stopped_run_leaves_the_page_of_what_it_has(tmp_path):
    planned = planned_image(height=8, width=8)
    with pytest.raises(KeyboardInterrupt), OutputWriter(tmp_path, [planned], False, is_main=True) as writer:
        writer.add(GeneratedBatch([planned], [Image.new("RGB", (8, 8))], [False]))
        raise KeyboardInterrupt
    assert planned.file_name in (tmp_path / "index.html").read_text()
