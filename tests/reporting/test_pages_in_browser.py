"""The page of a run as Chromium shows it, on a phone and on a wide screen, light and dark."""

import pytest

from browser import open_page
from reported_run import HOSTILE, data_pictures, facts_of, write_record, write_rows, write_validation
from reporting.run_page import RunState, Thumbnails, write_run_page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """All parts of a page at once; captions, names and prompts are hostile."""
    folder = tmp_path_factory.mktemp("run")
    write_record(folder, base_model=HOSTILE[:300])
    write_rows(folder, range(1, 201))
    write_validation(folder, [0, 40, 80, 120, 160, 200], [HOSTILE.replace("\0", "")[:400], "denim jeans"])
    pictures = data_pictures(folder / "data", 70, HOSTILE)
    settings = [("--trigger", HOSTILE[:500], "flag"), ("--train_batch_size", "4", "training_defaults.json")]
    facts = facts_of(pictures, warnings=[HOSTILE], command=HOSTILE, settings=settings)
    write_run_page(folder, facts, RunState("stopped", "stopped after step 200"), Thumbnails())
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_opens_without_errors_or_requests_and_everything_can_be_read(page, tmp_path, width, dark):
    found = open_page(page, width, dark, tmp_path)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["console"] == [] and found["requests"] == [] and not found["alerted"]
    assert found["images"] == 72 and found["broken"] == 0
    assert found["scroll_width"] <= width and found["outside"] == found["squeezed"] == []
    assert found["faint"] == []  # WCAG AA
