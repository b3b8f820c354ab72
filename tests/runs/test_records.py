"""run.json: its fingerprint, its differences from another, and the folders of runs."""

import json
from pathlib import Path

import pytest

from runs.records import (
    fingerprint_run,
    newest_finished_run,
    output_folder,
    read_run,
    remove_run,
    run_differences,
    seed_for,
    write_run,
)
from runtime.errors import UserError, WorkError

ARGUMENTS = {"learning_rate": 1e-5, "epochs": 100, "output_dir": None, "train_batch_size": 4, "dataset": "a"}


def run(data: str = "d", model: str = "m", batch: int = 4, seed: int | None = None, **changes) -> dict:
    return {
        "arguments": {**ARGUMENTS, **changes}, "dataset_hash": data, "base_model_hash": model, "global_batch": batch,
        "seed_asked": seed, "mixed_precision": "no", "prior_guidance_scale": 3.0,
    }  # fmt: skip


def fingerprint(**changes) -> str:
    return fingerprint_run(run(**changes))


def test_the_fingerprint_depends_on_what_changes_the_weights_only():
    same = fingerprint()
    assert fingerprint(epochs=200, output_dir=Path("x"), dataset="moved", train_batch_size=2) == same
    changed = [
        fingerprint(learning_rate=2e-5), fingerprint(data="e"), fingerprint(model="n"), fingerprint(batch=8),
        fingerprint(seed=1), fingerprint(seed=0), fingerprint(a_flag_of_the_future=1), fingerprint(lr_warmup_steps=0),
    ]  # fmt: skip
    assert len({same, *changed}) == 1 + len(changed)
    assert all(fingerprint(a_flag_of_the_future=off) == same for off in (None, False, 0, 0.0))


def test_without_a_seed_the_run_gets_one_from_its_fingerprint():
    assert seed_for(None, fingerprint()) == seed_for(None, fingerprint(epochs=3))
    assert seed_for(None, fingerprint()) != seed_for(None, fingerprint(data="e"))
    assert seed_for(0, fingerprint()) == 0


def test_a_run_gets_a_folder_of_its_own_unless_one_is_named():
    folder = output_folder(None, Path("/somewhere/my garments"), Path("base"), fingerprint())
    assert folder.parent.name == "output" and folder.name == f"my garments-{fingerprint()[:8]}"
    assert output_folder(Path("x"), Path("y"), Path("base"), fingerprint()) == Path("x")


def test_the_base_model_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="--output_dir"):
        output_folder(tmp_path / "a" / "..", Path("y"), tmp_path, fingerprint())


def test_run_json_is_read_back(tmp_path):
    assert read_run(tmp_path / "new") is None
    write_run(tmp_path / "new", {"steps": 3, "path": Path("x")})
    assert read_run(tmp_path / "new") == {"steps": 3, "path": "x"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_the_differences_between_two_runs_are_listed(tmp_path):
    write_run(tmp_path, run(seed=1))
    assert run_differences(read_run(tmp_path), run(seed=1, epochs=3, output_dir=Path("x"))) == []
    assert run_differences(read_run(tmp_path), run(seed=2, learning_rate=1, data="other")) == [
        "the data set: other pictures, masks, repeats, captions or other forms of them",
        "learning_rate: 1e-05 there, 1 here",
        "seed_asked: 1 there, 2 here",
    ]
    assert run_differences(read_run(tmp_path), run(seed=1, a_new_flag=0.0)) == []
    assert run_differences(read_run(tmp_path), run(seed=1, a_new_flag=0.1)) == ["a_new_flag: null there, 0.1 here"]
    assert (
        run_differences(run(seed=1, a_flag=None), run(seed=1, a_flag=0.0))
        == run_differences(run(a_flag=False), run())
        == []
    )
    assert run_differences({"steps": 3}, run()) == ["its run.json does not say with which arguments it was made"]


def test_removing_a_run_leaves_other_files(tmp_path):
    for name in ("run.json", "metrics.jsonl", "report.html", "notes.txt"):
        (tmp_path / name).write_text("{}")
    for name in ("checkpoint-2", "validation", "unet", "my pictures"):
        (tmp_path / name).mkdir()
    remove_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my pictures", "notes.txt"]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json"):
        read_run(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="file"):
        write_run(tmp_path / "file" / "run", {})


def test_the_newest_finished_run_is_found_by_its_own_record(tmp_path):
    assert newest_finished_run(tmp_path) is None
    for name, run in {
        "a-later": {"finished": True, "finished_at": "2026-02-01T00:00:00+00:00"},
        "b-earlier": {"finished": True, "finished_at": "2026-01-01T00:00:00+00:00"},
        "c-unfinished": {"finished": False},
        "d-newest but unfinished": {"finished": False, "finished_at": "2026-03-01T00:00:00+00:00"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    (tmp_path / "e-damaged").mkdir()
    (tmp_path / "e-damaged" / "run.json").write_text("{")
    assert newest_finished_run(tmp_path).name == "a-later"
