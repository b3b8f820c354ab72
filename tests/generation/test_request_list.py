"""Requests of a prompts file; every bad line is refused by its number."""

import argparse
import json
from pathlib import Path

import pytest

from generation.request_list import GenerationRequest, read_requests
from runtime.errors import UserError
from runtime.paths import DATASET


@pytest.fixture
def file(tmp_path):
    def file(content: str | bytes, name: str = "prompts.txt") -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return file


def test_each_line_of_a_text_file_is_a_prompt(file):
    path = file("\ufeffdenim jeans\r\n\n  a red t-shirt, laid flat \nwith a \u2028 separator")
    assert read_requests(path) == [
        GenerationRequest("denim jeans"),
        GenerationRequest("a red t-shirt, laid flat"),
        GenerationRequest("with a \u2028 separator"),
    ]


def test_a_row_may_set_what_differs_for_its_prompt(file):
    row = {"prompt": "jeans", "negative_prompt": "blurred", "seed": 7, "steps": 30, "scheduler": "ddim",
           "guidance_scale": 2.5, "guidance_rescale": 0.7, "num_images": 3, "height": 96, "width": 64}  # fmt: skip
    rows = [row, {"text": "a skirt", "seed": None}, {"prompt": ""}]
    assert read_requests(file("\n".join(map(json.dumps, rows)), "p.jsonl")) == [
        GenerationRequest("jeans", "blurred", 7, 30, "ddim", 2.5, 0.7, 3, 96, 64),
        GenerationRequest("a skirt"),
        GenerationRequest(""),
    ]


def test_a_data_sets_metadata_is_a_prompts_file(file):
    requests = read_requests(DATASET / "metadata.jsonl")
    rows = [json.loads(line) for line in (DATASET / "metadata.jsonl").read_text().splitlines()]
    assert requests == [GenerationRequest(row["text"]) for row in rows]
    several = {"file_name": "1.jpg", "text": ["jeans", "blue jeans"], "licence": "mine", "width": 4032, "seed": "x"}
    assert read_requests(file(json.dumps(several), "metadata.jsonl")) == [
        GenerationRequest("jeans"),
        GenerationRequest("blue jeans"),
    ]


def test_images_jsonl_is_a_prompts_file_with_its_seeds(file):
    row = {"file_name": "x.png", "prompt": "jeans", "seed": 3, "steps": 20, "scheduler": "ddim", "guidance": 4.0}
    request = GenerationRequest("jeans", seed=3, steps=20, scheduler="ddim", guidance_scale=4.0, num_images=1)
    assert read_requests(file(json.dumps({**row, "model": "x"}), "images.jsonl")) == [request]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"seed": 1}', "line 2: `prompt`"),
        ('{"prompt": 7}', "line 2: `prompt`"),
        ('{"prompt": []}', "line 2: `prompt`"),
        ('{"prompt": "x", "guidence_scale": 4}', "line 2: unknown: guidence_scale"),
        ('{"prompt": "x", "seed": -1}', "line 2: `seed`"),
        ('{"prompt": "x", "seed": 1.5}', "line 2: `seed`"),
        ('{"prompt": "x", "steps": true}', "line 2: `steps`"),
        ('{"prompt": "x", "guidance_scale": NaN}', "line 2: `guidance_scale`"),
        ('{"prompt": "x", "negative_prompt": 1}', "line 2: `negative_prompt`"),
        ('{"prompt": "\\ud800"}', "line 2: `prompt`"),
        ('{"prompt": "x", "negative_prompt": "\\ud800"}', "line 2: `negative_prompt`"),
        ('{"prompt": "x", "scheduler": "eulr"}', "line 2: `scheduler`"),
    ],
)
def test_every_bad_line_is_named(file, row, complaint):
    with pytest.raises(UserError) as caught:
        read_requests(file(f'{{"prompt": "good"}}\n{row}\n{{"seed": 2}}', "p.jsonl"))
    assert complaint in str(caught.value) and "line 3" in str(caught.value)


def test_a_file_that_cannot_be_used_is_named(file, tmp_path):
    for path, complaint in [
        (tmp_path / "none.txt", "cannot be read"),
        (file("\n\n"), "no prompt in it"),
        (file(b"caf\xe9", "latin.txt"), "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=f"--prompts_file {path}: {complaint}"):
            read_requests(path)


def test_a_requests_own_values_win_over_the_flags():
    flags = argparse.Namespace(seed=5, steps=25, height=None, output_dir="out", **dict.fromkeys(
        ("negative_prompt", "scheduler", "guidance_scale", "guidance_rescale", "num_images", "width")))  # fmt: skip
    merged = GenerationRequest("jeans", seed=0, height=64).merge_flags(flags)
    assert (merged.seed, merged.steps, merged.height, merged.output_dir) == (0, 25, 64, "out")
    assert flags.seed == 5
