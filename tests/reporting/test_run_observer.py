"""The page while a run trains: when it is written, and that it never ends a run."""

import contextlib

import pytest

from reported_run import facts_of
from reporting.run_observer import RunObserver
from reporting.run_page import FINISHED
from runtime.errors import Stopped


@pytest.fixture
def written(monkeypatch) -> list[str]:
    states: list[str] = []
    monkeypatch.setattr("reporting.run_observer.write_run_page", lambda folder, facts, state, _: states.append(state))
    return states


def observer(tmp_path, due=(0, 5, 10)) -> RunObserver:
    return RunObserver(lambda: tmp_path, lambda: facts_of([]), due)


def test_it_is_written_after_the_steps_that_matter_once_their_rows_are_on_disk(tmp_path, written):
    page = observer(tmp_path)
    for step, all_written in ((0, True), (3, True), (5, False), (6, False), (7, True), (8, True), (10, True)):
        page.not_before = 0.0
        before = len(written)
        page.follow(step, all_written, contextlib.nullcontext)
        assert (len(written) > before) == (step in (0, 7, 10)), step


def test_a_page_that_takes_long_is_written_seldom(tmp_path, written, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    page = observer(tmp_path, range(1000))
    monkeypatch.setattr(page, "make_facts", lambda: clock.__setitem__(0, clock[0] + 1.0) or facts_of([]))
    page.follow(0, True, contextlib.nullcontext)
    page.facts = None
    for step in range(1, 101):
        clock[0] += 1.0
        page.follow(step, True, contextlib.nullcontext)
        page.facts = None
    assert 8 <= len(written) <= 12


@pytest.mark.parametrize(("error", "said"), [
    (OSError(28, "No space left on device"), "No space left"), (RuntimeError("no font"), "no font"),
    (ImportError("No module named 'jinja2'"), "pip install"),
])  # fmt: skip
def test_a_page_that_cannot_be_made_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("reporting.run_observer.write_run_page", fail)
    page = observer(tmp_path)
    for _ in range(3):
        page.write(FINISHED)
    [line] = capsys.readouterr().err.splitlines()
    assert "report.html" in line and said in line


def test_it_says_how_the_run_ended_and_lets_the_end_through(tmp_path, written):
    for error in (Stopped("stopped after step 3"), RuntimeError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), observer(tmp_path).until(FINISHED):
            raise error
    with observer(tmp_path).until(FINISHED):
        pass
    assert [state.kind for state in written] == ["stopped", "failed", "finished"]
    assert written[0].words == "stopped after step 3"


def test_another_process_and_a_run_without_a_page_write_nothing(tmp_path, written):
    page = RunObserver(lambda: tmp_path, None, {0})
    page.follow(0, True, contextlib.nullcontext)
    with page.until(FINISHED):
        pass
    assert written == [] and page.facts is None
