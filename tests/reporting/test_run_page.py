"""The page of a run: what it shows of OUTPUT, whatever stands in captions, and that it stays small."""

import html
import re
import time

from PIL import Image

from reported_run import HOSTILE, data_pictures, facts_of, write_record, write_rows, write_validation
from reporting.run_page import (
    FINISHED,
    MOST_STEPS,
    RunState,
    Thumbnails,
    choose_steps,
    key_figures,
    picture_table,
    write_run_page,
)


def page_of(folder, facts, state=FINISHED) -> str:
    write_run_page(folder, facts, state, Thumbnails())
    return (folder / "report.html").read_text(encoding="utf-8")


def run_of(folder, steps: int = 40, **record):
    write_record(folder, **record)
    write_rows(folder, range(1, steps + 1))
    return folder


def test_a_hostile_caption_prompt_or_name_is_shown_and_runs_nothing(tmp_path):
    run_of(tmp_path, base_model=HOSTILE[:200])
    write_validation(tmp_path, [0, 40], [HOSTILE.replace("\0", "")[:300]])
    facts = facts_of(data_pictures(tmp_path / "data", 2, HOSTILE), settings=[("--trigger", HOSTILE, "flag")],
                     command=HOSTILE, warnings=[HOSTILE])  # fmt: skip
    page = page_of(tmp_path, facts)
    assert page.count("<script>") == 1 and "<img src=x" not in page  # the one that copies commands
    assert html.escape(HOSTILE[:40], quote=True).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page
    assert "{{ 7 * 7 }}" in page


def test_it_asks_for_nothing_and_every_picture_stands_in_it(tmp_path):
    run_of(tmp_path)
    write_validation(tmp_path, [0, 20, 40], ["denim jeans", "a red t-shirt"])
    page = page_of(tmp_path, facts_of(data_pictures(tmp_path / "data", 3)))
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 9 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"https?://|<link (?!rel=\"icon\" href=\"data:)|@import|url\((?!#)", page)


def test_three_thousand_pictures_are_listed_and_some_are_shown(tmp_path):
    run_of(tmp_path, 2000)
    pictures = data_pictures(tmp_path / "data", 3000, "A pair of denim jeans. " * 20)
    Image.effect_noise((1600, 1200), 90).save(tmp_path / "data" / "jeans.jpg")
    facts, began = facts_of(pictures), time.process_time()
    page = page_of(tmp_path, facts)
    assert time.process_time() - began < 5 and len(page) < 10_000_000
    assert page.count("src=") == len(facts.pictures) == 60 and "2,940 more" in page
    assert "2999 jeans.jpg" in page


def test_a_picture_that_is_gone_leaves_a_card_without_it(tmp_path):
    run_of(tmp_path)
    facts = facts_of(data_pictures(tmp_path / "data", 2))
    (tmp_path / "data" / "jeans.jpg").unlink()
    assert "1 jeans.jpg" in page_of(tmp_path, facts)


def test_a_run_that_measured_and_generated_nothing_has_a_page_from_its_start(tmp_path):
    write_record(tmp_path)
    page = page_of(tmp_path, facts_of(data_pictures(tmp_path / "data", 1)), RunState())
    assert "running" in page and "What it generates" not in page and "held out" in page


def test_pictures_and_rows_of_what_a_kill_undid_are_not_shown(tmp_path):
    run_of(tmp_path, 20)
    write_validation(tmp_path, [0, 20, 30], ["denim jeans"])
    rows = [{"step": step} for step in range(1, 21)]
    assert picture_table(tmp_path, rows, Thumbnails()).steps == [0, 20]


def test_prompts_of_an_earlier_start_have_rows_of_their_own(tmp_path):
    write_validation(tmp_path, [0, 10], ["denim jeans"])
    write_validation(tmp_path, [20], ["a red t-shirt"])
    (tmp_path / "validation" / "step-000010-1.png").write_bytes(b"no picture")
    table = picture_table(tmp_path, [{"step": 20}], Thumbnails())
    shown = [(prompt, [bool(picture) for picture in pictures]) for prompt, _, pictures in table.rows]
    assert shown == [("denim jeans", [True, True, False]), ("a red t-shirt", [False, False, True])]


def test_of_many_steps_the_first_the_best_and_the_last_are_shown(tmp_path):
    steps = list(range(0, 1000, 10))
    chosen = choose_steps(steps, 370)
    assert len(chosen) == MOST_STEPS and {0, 370, 990} <= set(chosen) and chosen == sorted(chosen)
    write_validation(tmp_path, steps[:15], ["denim jeans"])
    assert picture_table(tmp_path, [{"step": 999}], Thumbnails()).left_out == 5


def test_the_first_numbers_are_those_that_tell_how_the_run_stands():
    rows = [{"step": 5, "epoch": 1.0, "images_per_second": 2.0, "train_fixed_loss": 0.5, "val_loss": 0.25}]
    figures = {
        name: (number, note) for name, number, note in key_figures({"steps": 10}, rows, facts_of([]), RunState())
    }
    assert figures["Steps"][0] == "5" and "of 10" in figures["Steps"][1]
    assert figures["Lowest held-out loss"] == ("0.2500", "at step 5")
    assert figures["Pictures a second"] == ("2", "about 10 s to go")
