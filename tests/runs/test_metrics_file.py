"""What is read from metrics.jsonl."""

from runs.metrics_file import best_step, read_metrics


def test_the_best_step_is_that_of_the_weights_that_are_saved():
    rows = [
        {"step": 1},
        {"step": 2, "val_loss": 0.2, "val_loss_ema": 0.4},
        {"step": 4, "val_loss": 0.3, "val_loss_ema": 0.1},
    ]
    assert best_step(rows) == (4, "val_loss_ema", 0.1)
    assert best_step([{"step": 2, "val_loss": 0.2}, {"step": 3, "val_loss": 0.3}]) == (2, "val_loss", 0.2)
    assert best_step(rows, among={1, 2}) == (2, "val_loss_ema", 0.4)
    assert best_step([{"step": 2, "train_fixed_loss": 0.2}]) is None


def test_a_line_that_a_kill_cut_in_two_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "train_l')
    assert read_metrics(path) == [{"step": 1}]
