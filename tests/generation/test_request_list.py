"""Requests of a prompts file; every bad line is refused by its number."""

import argparse
import json
from pathlib import Path

import pytest

from generation.foreign_prompts import syntax_note
from generation.request_list import GenerationRequest, read_requests
from runtime.errors import UserError
from runtime.paths import DATASET


@pytest.fixture
def file(tmp_path):
    def file(content: str | bytes, name: str = "prompts.txt") -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return file


def requests_in(path: Path) -> list[GenerationRequest]:
    requests, notes = read_requests(path)
    assert notes == []
    return requests


def test_each_line_of_a_text_file_is_a_prompt(file):
    path = file("\ufeffdenim jeans\r\n\n  a red t-shirt, laid flat \nwith a \u2028 separator")
    assert requests_in(path) == [
        GenerationRequest("denim jeans"),
        GenerationRequest("a red t-shirt, laid flat"),
        GenerationRequest("with a \u2028 separator"),
    ]


def test_a_row_may_set_what_differs_for_its_prompt(file):
    row = {"prompt": "jeans", "negative_prompt": "blurred", "seed": 7, "steps": 30, "scheduler": "ddim",
           "guidance_scale": 2.5, "guidance_rescale": 0.7, "num_images": 3, "height": 96, "width": 64}  # fmt: skip
    rows = [row, {"text": "a skirt", "seed": None}, {"prompt": ""}]
    assert requests_in(file("\n".join(map(json.dumps, rows)), "p.jsonl")) == [
        GenerationRequest("jeans", "blurred", 7, 30, "ddim", 2.5, 0.7, 3, 96, 64),
        GenerationRequest("a skirt"),
        GenerationRequest(""),
    ]


def test_a_data_sets_metadata_is_a_prompts_file(file):
    requests = requests_in(DATASET / "metadata.jsonl")
    rows = [json.loads(line) for line in (DATASET / "metadata.jsonl").read_text().splitlines()]
    assert requests == [GenerationRequest(row["text"]) for row in rows]
    several = {"file_name": "1.jpg", "text": ["jeans", "blue jeans"], "licence": "mine", "width": 4032, "seed": "x"}
    assert requests_in(file(json.dumps(several), "metadata.jsonl")) == [
        GenerationRequest("jeans"),
        GenerationRequest("blue jeans"),
    ]


def test_a_metadata_csv_is_a_prompts_file(file):
    path = file('file_name,text\n1.jpg,"A pair, of jeans"\n\n2.jpg,A skirt\n', "metadata.csv")
    assert requests_in(path) == [GenerationRequest("A pair, of jeans"), GenerationRequest("A skirt")]
    with pytest.raises(UserError, match="--prompts_file .*prompts.csv:\n  line 2: 3 values"):
        read_requests(file("file_name,text\n1.jpg,jeans, blue\n", "prompts.csv"))
    with pytest.raises(UserError, match="--prompts_file.*prompts.csv: .*file_name"):
        read_requests(file("denim jeans, blue\n", "prompts.csv"))


def test_images_jsonl_is_a_prompts_file_with_its_seeds(file):
    row = {"file_name": "x.png", "prompt": "jeans", "seed": 3, "steps": 20, "scheduler": "ddim", "guidance": 4.0}
    request = GenerationRequest("jeans", seed=3, steps=20, scheduler="ddim", guidance_scale=4.0, num_images=1)
    assert requests_in(file(json.dumps({**row, "model": "x"}), "images.jsonl")) == [request]


KOHYA = "denim jeans on white --n low quality, blurry --w 512 --h 768 --d 1 --l 7.5 --s 28 --ss euler_a"
WEBUI = """--prompt "a castle, it's old" on a hill --negative_prompt trees --steps 20 --cfg_scale 6 --width 512 """
WEBUI += """--height 768 --seed 3 --sampler_name "DPM++ 2M SDE Karras" --n_iter 2 --batch_size 3"""


def test_kohyas_and_automatic1111s_lines_set_what_they_set_there(file):
    assert requests_in(file(f"{KOHYA}\n\n{WEBUI}\na skirt --N red --W 64")) == [
        GenerationRequest("denim jeans on white", "low quality, blurry", 1, 28, "euler_a", 7.5, None, None, 768, 512),
        GenerationRequest(
            "a castle, it's old on a hill", "trees", 3, 20, "dpmpp_2m_sde_karras", 6.0, None, 6, 768, 512
        ),
        GenerationRequest("a skirt", "red", width=64),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "a shirt -- red, --very red",
        "a poster --ar 3:2 --v 5",
        "size --s large, --w wide",
        "--no people, a street",
        "a well--worn coat--w 512",
        "no. #7 --",
        " #jeans",
        "--prompts are here",
    ],
)
def test_a_plain_prompt_is_not_torn_apart(file, line):
    assert requests_in(file(line)) == [GenerationRequest(line.strip())]


def test_what_cannot_be_honoured_is_named_with_its_line(file):
    kohya, webui = "jeans --w 64 --am 0.8 --new thing --ss dpm_2", "--prompt jeans --styles mine --seed -1 --steps 9"
    requests, [note] = read_requests(file(f"{kohya}\nplain\n{webui}"))
    assert requests[::2] == [GenerationRequest("jeans", width=64), GenerationRequest("jeans", steps=9)]
    for option in ("--am 0.8", "--new thing", "--ss dpm_2"):
        assert f"{option} (line 1)" in note
    assert "prompts.txt" in note and "--styles mine (line 3)" in note and "--seed -1 (line 3)" in note


def test_lines_of_comments_are_counted(file):
    requests, [note] = read_requests(file("# one\njeans\n#denim jeans\n #7"))
    assert requests == [GenerationRequest("jeans"), GenerationRequest("#7")]
    assert "prompts.txt" in note and "comments" in note and "2" in note


@pytest.mark.parametrize("line", ["jeans --d -1", "jeans --d -1 --w 64", "--prompt jeans --seed -1"])
def test_a_random_seed_is_the_same_as_none_in_both_kinds_of_lines(file, line):
    [request], [note] = read_requests(file(line))
    assert (request.prompt, request.seed) == ("jeans", None) and "-1 (line 1)" in note


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("jeans --w 512px", "line 2: `width`"),
        ("jeans --w 512 --s many", "line 2: `steps`"),
        ("--w 512", "line 2: no prompt"),
        ("--prompt a dog's bone", "line 2: no closing quotation"),
        ("--prompt jeans --foo 3", "line 2: --foo"),
        ("--steps 20", "line 2: no --prompt"),
        ("--prompt jeans --steps", "line 2: --steps"),
        ("--prompt jeans --width 1.5", "line 2: `width`"),
        ("--prompt jeans --steps 3 4", "line 2: 4"),
    ],
)
def test_a_wrong_option_is_refused_by_its_line(file, line, complaint):
    with pytest.raises(UserError, match=f"--prompts_file .*\n  {complaint}"):
        read_requests(file(f"jeans\n{line}\n"))


@pytest.mark.parametrize(
    "syntax", ["(denim jeans:1.3)", "((cuffs))", "[cuffs]", "<lora:style:0.8>", "BREAK", "[red:blue:0.5]"]
)
def test_syntax_of_other_programs_is_said_once(syntax):
    note = syntax_note([f"a shirt, {syntax} on white", f"jeans {syntax}"])
    assert note.count(syntax) == 1 and "\n" not in note
    assert syntax_note(["a shirt (red), 16:9, breakfast: (one", "two:1.5)", "AT BREAKFAST"]) is None


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
        (tmp_path / "none.txt", "No such file"),
        (file("\n\n"), "no prompt in it"),
        (file("#jeans"), "no prompt in it; .*#"),
        (file(b"caf\xe9", "latin.txt"), "not UTF-8"),
        (file("jeans".encode("utf-16-le"), "wide.txt"), "UTF-16"),
        (file("jeans".encode("utf-16"), "marked.txt"), "UTF-16"),
        (file('{"prompt": "jeans"}'.encode("utf-16-le"), "wide.jsonl"), "UTF-16"),
    ]:
        with pytest.raises(UserError, match=f"--prompts_file.* {path}: .*{complaint}"):
            read_requests(path)


def test_a_requests_own_values_win_over_the_flags():
    flags = argparse.Namespace(seed=5, steps=25, height=None, output_dir="out", **dict.fromkeys(
        ("negative_prompt", "scheduler", "guidance_scale", "guidance_rescale", "num_images", "width")))  # fmt: skip
    merged = GenerationRequest("jeans", seed=0, height=64).merge_flags(flags)
    assert (merged.seed, merged.steps, merged.height, merged.output_dir) == (0, 25, 64, "out")
    assert flags.seed == 5


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("p.txt", "denim jeans\r\n".encode("utf-16"), "UTF-16"),
        ("p.txt", "denim jeans\r\n".encode("utf-16-le"), "UTF-16"),
        ("p.csv", b"prompt,seed\njeans,3\n", ".csv"),
        ("p.yaml", b"- jeans\n", ".yaml"),
        ("p.json", b'[\n {"prompt": "jeans"}\n]', "one JSON array"),
        (
            "p.txt",
            b"jeans\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Size: 512x512",
            "line 2: AUTOMATIC1111",
        ),
    ],
)
def test_a_file_whose_lines_are_no_prompts_is_refused(file, name, content, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        read_requests(file(content, name))
    assert name in str(error.value)


def test_json_lines_are_read_whatever_the_name_of_the_file(file):
    path = file(json.dumps({"prompt": "jeans", "seed": 7}) + "\n{red|blue} jeans")
    assert requests_in(path) == [GenerationRequest("jeans", seed=7), GenerationRequest("{red|blue} jeans")]


@pytest.mark.parametrize("syntax", ["--ar 16:9", "--d", "—n", "{red|blue}", "__colour__"])
def test_other_programs_options_and_wildcards_are_said_not_to_be_interpreted(syntax):
    assert syntax in (syntax_note([f"denim jeans {syntax}"]) or "")
    assert syntax_note(["jeans -- blue — and well-worn, size 30-32"]) is None
