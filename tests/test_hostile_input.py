"""Models and data sets of people who mean harm, or never thought of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bases.finding import ModelOptions, find_model
from captioned_folder import write_captioned_folder
from run_folder import losses
from runtime.errors import UserError, exit_with
from tiny_model import add_safety_checker


class Harmful:
    """A pickle that makes a file when it is read."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def pickled(model: Path) -> Path:
    names = (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    )
    for part, name, pickle in names:
        weights = model / part / f"{name}.safetensors"
        torch.save(load_file(weights), model / part / f"{pickle}.bin")
        weights.unlink()
    return model


def test_pickles_are_refused_with_the_way_out_and_converted_where_allowed(train_run, own_model, monkeypatch, tmp_path):
    monkeypatch.setattr("bases.finding.OUTPUTS", tmp_path / "output")
    usual = ["--max_train_steps", 2, "--learning_rate", 1e-3, "--seed", 0]
    plain = train_run("plain", *usual)
    pickled(own_model)
    with pytest.raises(UserError, match=r"text_encoder/pytorch_model.bin is a pickle.*--allow_pickle"):
        train_run("refused", *usual, model=own_model)
    assert losses(train_run("allowed", *usual, "--allow_pickle", model=own_model)) == losses(plain)
    [converted] = (tmp_path / "output" / "converted").iterdir()
    assert not list(converted.rglob("*.bin")) and (own_model / "unet" / "diffusion_pytorch_model.bin").is_file()


def test_a_run_with_checkpoints_in_its_folder_is_no_model_of_pickles(train_run):
    out = train_run("out", "--max_train_steps", 1, "--checkpointing_steps", 1)
    assert (out / "checkpoint-1" / "training_state.pt").is_file()
    assert find_model(str(out), "--model").path == out


def test_a_pickle_that_would_run_code_is_refused_even_where_pickles_are_allowed(own_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bases.finding.OUTPUTS", tmp_path / "output")
    pickled(own_model)
    torch.save(Harmful(tmp_path / "made"), own_model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="unet cannot be loaded"):
        find_model(str(own_model), "--model", ModelOptions(allow_pickle=True))
    assert not (tmp_path / "made").exists()


def test_a_pickle_of_one_file_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle.*--allow_pickle"):
        find_model(str(tmp_path / "model.ckpt"), "--model")


def test_code_that_comes_with_a_model_is_never_run(train_run, own_model, tmp_path):
    (own_model / "unet" / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Evil: ...\n")
    index = json.loads((own_model / "model_index.json").read_text())
    index["unet"] = ["evil", "Evil"]
    (own_model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="unet.*'evil'"):
        train_run("out", "--max_train_steps", 1, model=own_model)
    assert not (tmp_path / "made").exists() and not (tmp_path / "out").exists()


def test_a_config_that_names_remote_code_does_not_run_it(train_run, own_model, tmp_path):
    config = own_model / "text_encoder" / "config.json"
    auto = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": auto}))
    (own_model / "text_encoder" / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    train_run("out", "--max_train_steps", 1, model=own_model)
    assert not (tmp_path / "made").exists()


def export(model: Path, to: Path) -> None:
    from export_checkpoint import parse_args
    from exporting.export import export_checkpoint

    export_checkpoint(parse_args(["--model", str(model), "--to", str(to)]))


def test_a_model_that_lacks_a_weight_is_refused_by_all_scripts_before_they_begin(
    train_run, images_of, own_model, tmp_path
):
    file = own_model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    name = max(weights)
    save_file({key: weights[key] for key in weights if key != name}, file, {"format": "pt"})
    for script in (
        lambda: train_run("out", "--max_train_steps", 1, model=own_model),
        lambda: images_of("--prompt", "jeans", model=own_model),
        lambda: export(own_model, tmp_path / "m.safetensors"),
    ):
        with pytest.raises(UserError, match=f"text_encoder/model.safetensors: weights are missing: .*{name[-20:]}"):
            script()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_training_and_generating_say_which_safety_checker_is_missing(train_run, images_of, own_model, capsys):
    add_safety_checker(own_model)
    shutil.rmtree(own_model / "safety_checker")
    train_run("out", "--max_train_steps", 1, model=own_model)
    assert "LEFT OUT of the result, as missing or without use: safety_checker" in capsys.readouterr().out
    images_of("--prompt", "jeans", model=own_model)
    assert "NOT CHECKED: the model's safety_checker" in capsys.readouterr().out


def test_captions_and_names_cannot_speak_to_the_terminal(train_run, tmp_path, capsys):
    clear = "\x1b[2J"
    folder = write_captioned_folder(tmp_path / "data", {f"a{clear}.jpg": f"a red {clear}t-shirt", "b.jpg": "jeans"})
    shutil.copy(folder / "b.jpg", folder / f"c{clear}.jpg")
    train_run("out", "--max_train_steps", 1, dataset=folder)
    (folder / f"a{clear}.jpg").write_bytes(b"")
    with pytest.raises(SystemExit):
        exit_with(lambda: train_run("out2", "--max_train_steps", 1, dataset=folder))
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err.replace("\x1b[A", "") and r"\x1b[2J" in said.out


@pytest.mark.parametrize("linked", [True, False], ids=["by a link", "by its name"])
def test_a_data_set_cannot_reach_outside_its_folder(train_run, tmp_path, linked):
    folder = write_captioned_folder(tmp_path / "data")
    secret = shutil.move(folder / "11 (3).JPG", tmp_path / "secret.jpg")
    if linked:
        (folder / "11 (3).JPG").symlink_to(secret)
    else:
        (folder / "metadata.jsonl").write_text('{"file_name": "../secret.jpg", "text": "a"}\n')
    with pytest.raises(UserError, match="folder"):
        train_run("out", dataset=folder)


def test_a_decompression_bomb_is_refused_by_name(train_run, tmp_path):
    from PIL import Image

    folder = write_captioned_folder(tmp_path / "data", {"bomb.png": "a small file"})
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    with pytest.raises(UserError, match=r"bomb.png: .*limit"):
        train_run("out", dataset=folder)
