"""Several folders, repeats, tags and shares of shorter captions in whole runs: summary, record, resume, refusals."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from background import finish, start
from captioned_folder import write_captioned_folder
from clone import ROOT
from models.loading import load_tokenizer
from packed_data import samples_of, table_of, write_shard
from run_folder import assert_same_bits, assert_same_tensors, losses
from runtime.errors import UserError
from train_text_to_image import parse_args
from training.objective import diffusion_loss
from training.plan import describe_run, make_plan
from training.setup import make_accelerator
from training.train import train

STEPS = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--seed", 0, "--checkpointing_steps", 2]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two folders with pictures of the same names; one is used twice in an epoch, one in every second one."""
    jeans = write_captioned_folder(tmp_path / "jeans", {"1.jpg": "denim jeans, blue, flat", "2.jpg": "red jeans, new"})
    shirts = write_captioned_folder(tmp_path / "shirts", {"1.jpg": "A t shirt, red. It is new. It is flat."})
    set_repeats(jeans, 2, 0.5)
    return jeans, shirts


def set_repeats(folder: Path, *repeats: float) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"repeats": number} for row, number in zip(rows, repeats, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_the_summary_and_the_record_say_each_folders_share(train_run, folders, capsys):
    jeans, shirts = folders
    out = train_run("out", *STEPS, "--epochs", 8, "--dataset", shirts, dataset=jeans)
    said = " ".join(capsys.readouterr().out.split())
    assert "pictures 3 in 2 folders" in said
    assert f"{jeans}: 2 pictures, 71.4% of the samples" in said and f"{shirts}: 1 picture, 28.6%" in said
    assert record(out)["folders"] == [
        {"folder": str(jeans), "pictures": 2, "share": 0.7143},
        {"folder": str(shirts), "pictures": 1, "share": 0.2857},
    ]
    assert record(out)["arguments"]["dataset"] == str(jeans)
    assert record(out)["arguments"]["more_datasets"] == [str(shirts)]


@pytest.mark.parametrize("flags", [[], ["--no_cache"]], ids=["cache", "no cache"])
def test_a_folder_and_containers_of_the_same_pictures_train_the_same_weights(train_run, tmp_path, flags):
    folder = write_captioned_folder(tmp_path / "jeans", {"1.jpg": "denim jeans, blue", "2.jpg": "red jeans, new"})
    flags = [*STEPS, *flags, "--max_train_steps", 2]
    packed = table_of(tmp_path / "0.parquet", folder)
    if "--no_cache" not in flags:
        write_shard(tmp_path / "shards" / "0.tar", samples_of(folder))
        packed = tmp_path / "shards" / "*.tar"
    runs = [train_run(name, *flags, dataset=data) for name, data in (("folder", folder), ("packed", packed))]
    assert_same_bits(*runs, step=2)
    assert record(runs[0])["fingerprint"] == record(runs[1])["fingerprint"]


def test_held_out_shards_within_the_data_set_are_refused(train_run, tmp_path):
    folder = write_captioned_folder(tmp_path / "plain")
    for name in ("0.tar", "held out/1.tar"):
        write_shard(tmp_path / "shards" / name, samples_of(folder))
    with pytest.raises(UserError, match=r"--validation_dir.*1\.tar.*would be trained on"):
        train_run(
            "out", "--max_train_steps", 1, "--validation_dir", tmp_path / "shards" / "held out",
            dataset=tmp_path / "shards",
        )  # fmt: skip


def test_epochs_count_the_rounded_sum_of_the_repeats(train_run, folders, capsys):
    flags = ["--epochs", 8, "--repeats", 2, "--train_batch_size", 4, "--dry_run", "--no_timing"]
    train_run("out", *flags, "--dataset", folders[1], dataset=folders[0])
    said = " ".join(capsys.readouterr().out.split())
    assert "16 (8 epochs x 4 samples of 3 pictures with their repeats x 2 repeats / batch of 4)" in said


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--samples", 10], "3 (10 samples of 3 pictures / batch of 4)"),
        (["--samples", 10, "--repeats", 9], "3 (10 samples of 3 pictures / batch of 4)"),
        (["--max_train_steps", 7], "7 (--max_train_steps)"),
    ],
)
def test_samples_say_how_long_a_run_is_however_many_pictures_there_are(train_run, folders, capsys, flags, steps):
    train_run(
        "out", *flags, "--train_batch_size", 4, "--dry_run", "--no_timing", "--dataset", folders[1], dataset=folders[0]
    )
    assert steps in " ".join(capsys.readouterr().out.split())


def test_a_models_number_of_samples_counts_unless_a_flag_says_how_long_the_run_is(tmp_path):
    def samples(*flags: str) -> int | None:
        return parse_args(["--dataset", "x", "--pretrained_model_name_or_path", str(tmp_path), *flags]).samples

    assert samples() is None
    (tmp_path / "training_defaults.json").write_text('{"samples": 4800}')
    assert samples() == 4800 and samples("--samples", "50") == 50
    assert samples("--epochs", "100") is samples("--max_train_steps", "9") is None


def test_pictures_of_one_name_are_told_apart_where_they_are_named(train_run, folders, capsys, monkeypatch):
    monkeypatch.setattr("training.train.diffusion_loss", lambda *given: diffusion_loss(*given) * torch.nan)
    flags = [*STEPS, "--max_bad_steps", 9, "--random_flip", "--max_token_chunks", 1, "--resolution", 128]
    (folders[0] / "metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "jeans with a logo"}\n')
    (folders[1] / "metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": "red flat " * 90}) + "\n")
    train_run("out", *flags, "--dataset", folders[1], dataset=folders[0])
    said = " ".join(capsys.readouterr().out.split())
    assert "its pictures: " in said and "jeans/1.jpg" in said.split("its pictures: ")[1]
    assert "jeans/1.jpg ('logo')" in said and "CUT at 75 tokens: shirts/1.jpg" in said
    assert "SMALLER and enlarged: jeans/1.jpg, shirts/1.jpg" in said


def test_one_folder_is_recorded_as_it_always_was(train_run, captioned_folder):
    arguments = record(train_run("out", *STEPS))["arguments"]
    assert arguments["dataset"] == str(captioned_folder) and arguments["more_datasets"] is None


ALL = ["--shuffle_tags", "--keep_tags", 1, "--tag_dropout", 0.2, "--short_captions", 0.3]


MASKS = ["--mask_from_alpha", "--unmasked_weight", 0.1]


@pytest.fixture
def masked_folders(folders) -> tuple[Path, Path]:
    """The same; one picture has a mask beside it, the row of one names a mask, one has its alpha, and one has none."""
    jeans, shirts = folders
    mask = save_mask(jeans / "1.mask.png", (6, 8, 30, 40))
    save_mask(jeans / "masks" / "2.png", (12, 20, 44, 60))
    rows = [json.loads(line) for line in (jeans / "metadata.jsonl").read_text().splitlines()]
    rows[1]["mask"] = "masks/2.png"
    (jeans / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = Image.new("RGB", (48, 64), "navy")
    picture.putalpha(mask)
    picture.save(shirts / "2.png")
    with (shirts / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "2.png", "text": "denim jeans, on white"}) + "\n")
    return jeans, shirts


def save_mask(path: Path, box: tuple[int, int, int, int]) -> Image.Image:
    path.parent.mkdir(exist_ok=True)
    mask = Image.new("L", (48, 64))
    mask.paste(255, box)
    mask.save(path)
    return mask


@pytest.mark.parametrize("choices", [[], ALL, MASKS, [*ALL, *MASKS]], ids=["repeats", "captions", "masks", "all"])
def test_a_run_with_new_choices_resumes_to_the_same_bits(train_run, masked_folders, choices):
    flags = [*STEPS, *choices, "--dataset", masked_folders[1], "--train_batch_size", 3, "--validation_steps", 2]
    flags += ["--lr_scheduler", "constant"]
    whole = train_run("whole", *flags, dataset=masked_folders[0])
    train_run("parts", *flags, "--max_train_steps", 2, dataset=masked_folders[0])
    assert_same_bits(whole, train_run("parts", *flags, dataset=masked_folders[0]), 4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_with_every_choice_has_the_same_losses_on_two_processes(train_run, masked_folders, tiny_model, tmp_path):
    flags = [*STEPS, *ALL, *MASKS, "--dataset", masked_folders[1]]
    alone = train_run("alone", *flags, "--train_batch_size", 4, dataset=masked_folders[0])
    command = ["--pretrained_model_name_or_path", tiny_model, "--dataset", masked_folders[0], *flags]
    command += ["--train_batch_size", 2, "--no_validation_pictures", "--no_report", "--output_dir", tmp_path / "two"]
    finish(start(tmp_path / "log", 2, *command))
    assert record(tmp_path / "two")["num_processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=1e-5)


def test_each_choice_changes_the_fingerprint(tiny_model, folders, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    jeans, shirts = map(str, folders)
    runs = [[], ["--shuffle_tags"], ["--shuffle_tags", "--keep_tags", "1"], ["--tag_dropout", "0.9"]]
    runs += [["--short_captions"], ["--no_short_captions"], ["--dataset", shirts]]
    prints = set()
    for flags in runs:
        args = parse_args(["--pretrained_model_name_or_path", str(tiny_model), "--dataset", jeans, *flags])
        accelerator, precision = make_accelerator(args)
        plan = make_plan(args, accelerator)
        prints.add(describe_run(args, plan, accelerator, load_tokenizer(plan.base), precision)["fingerprint"])
    assert len(prints) == len(runs)


def test_encoding_live_reads_the_same_orders_as_stored_encodings(train_run, folders):
    flags = [*STEPS, *ALL, "--dataset", folders[1]]
    stored, live = (
        train_run("stored", *flags, dataset=folders[0]),
        train_run("live", *flags, "--no_cache", dataset=folders[0]),
    )
    assert losses(live) == pytest.approx(losses(stored), abs=1e-5)


def test_the_summary_says_how_many_captions_are_tags_and_how_many_orders_are_kept(train_run, folders, capsys):
    out = train_run("out", *STEPS, *ALL, "--dataset", folders[1], dataset=folders[0])
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 captions are lists of tags; up to 16 forms of each are encoded" in said
    assert "20% of the tags left out; the first 1 stay" in said
    assert "with their shorter variants and orders of tags; the longest" in said
    assert "denim jeans, blue, flat" in record(out)["example_prompts"]  # as it is written


def test_the_summary_names_the_kinds_of_captions_that_there_are(train_run, folders, capsys):
    kinds = {
        ("--no_short_captions", "--shuffle_tags"): "with their orders of tags; the longest",
        ("--no_short_captions", "--tag_dropout", 0.5): "with their forms with tags left out; the longest",
        (): "with their shorter variants; the longest",
        ("--no_short_captions",): "captions 2; the longest",
    }
    for flags, said in kinds.items():
        train_run("out", "--dry_run", "--no_timing", *flags, dataset=folders[0])
        assert said in " ".join(capsys.readouterr().out.split())


def test_tags_are_refused_where_no_caption_is_a_list_of_them(train_run, tmp_path):
    folder = write_captioned_folder(tmp_path / "data", {"1.jpg": "A t shirt, red."})
    for flags in (["--shuffle_tags"], ["--tag_dropout", 0.1]):
        with pytest.raises(UserError, match=f"{flags[0]}: no caption is a list of tags"):
            train_run("out", *STEPS, *flags, dataset=folder)
    with pytest.raises(UserError, match="--keep_tags needs"):
        parse_args(["--dataset", "x", "--keep_tags", "1"])


def test_held_out_pictures_of_several_folders_are_measured_by_their_captions_as_written(train_run, folders):
    flags = [*STEPS, *ALL, "--dataset", folders[1], "--validation_split", 0.4]
    out = train_run("out", *flags, dataset=folders[0])
    assert sum(size["pictures"] for size in record(out)["sizes"]) == 2
    assert any("val_loss" in line for line in (out / "metrics.jsonl").read_text().splitlines())


def test_a_share_of_shorter_captions_is_read_from_its_flag_and_bare_means_what_it_did():
    def value(*flags: str, model: str = "some/model"):
        return parse_args(["--dataset", "x", "--pretrained_model_name_or_path", model, *flags]).short_captions

    assert value() == 0.5
    assert value("--short_captions", "0.3") == value("--short_captions=0.3") == 0.3
    assert value("--short_captions", "--use_ema") is True and value("--no_short_captions") is False
    for wrong in (["--short_captions", "2"], ["--short_captions", "yes"], ["--no_short_captions", "0.5"]):
        with pytest.raises(UserError, match="short_captions"):
            value(*wrong)


def test_the_starter_keeps_its_own_shares_of_shorter_captions():
    args = parse_args(["--dataset", "x"])
    assert args.short_captions is True and args.origins["short_captions"] == "training_defaults.json"


DATASET_README = (ROOT / "dataset" / "README.md").read_text()


EXAMPLES = {
    "--repeats": "others: 3 pictures, 50.0% of the samples",
    "--shuffle_tags": "1 of 4 captions are lists of tags",
    "--unmasked_weight": "1 of 3 pictures have one, on average 25.0% white, at least 25.0%; what is black counts 0.1",
    "--short_captions": "short_captions=0.2",
}


@pytest.mark.parametrize("flag", EXAMPLES)
def test_the_examples_of_the_data_sets_readme_run_as_they_stand(flag, tiny_model, tmp_path, monkeypatch, capsys):
    rows = [line for line in DATASET_README.splitlines() if line.startswith('{"file_name"')]
    for name in ("jeans", "others"):
        write_captioned_folder(tmp_path / name, {json.loads(row)["file_name"].split("/")[-1]: "" for row in rows})
        (tmp_path / name / "more").mkdir()
        (tmp_path / name / "2.jpg").rename(tmp_path / name / "more" / "2.jpg")
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(rows))
        save_mask(tmp_path / name / json.loads(rows[2])["mask"], (0, 0, 24, 32))
    [command] = [
        line
        for line in DATASET_README.splitlines()
        if f" {flag}" in line and line.startswith("python") and "~" in line
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--pretrained_model_name_or_path", str(tiny_model), "--dry_run", "--no_timing"]
    train(parse_args([*shlex.split(command)[2:], *flags]))
    said = " ".join(capsys.readouterr().out.split())
    assert "0.5" in rows[2] and EXAMPLES[flag] in said and "samples of" in said


def test_two_folders_with_the_pictures_of_one_train_as_one_does(train_run, tmp_path):
    one = write_captioned_folder(tmp_path / "one", {"1.jpg": "denim jeans", "2.jpg": "a red t shirt"})
    first = write_captioned_folder(tmp_path / "first", {"1.jpg": "denim jeans"})
    second = write_captioned_folder(tmp_path / "second", {"1.jpg": "a red t shirt"})
    together = train_run("together", *STEPS, "--dataset", second, dataset=first)
    assert_same_tensors(train_run("alone", *STEPS, dataset=one), together, "unet/*.safetensors")
