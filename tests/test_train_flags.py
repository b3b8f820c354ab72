"""The flags of train_text_to_image.py: which there are, which go together, and that a token goes to the hub alone."""

import sys
import types

import pytest

from runtime.errors import UserError
from train_text_to_image import build_parser, parse_args

DIFFUSERS_FLAGS = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "allow_tf32", "cache_dir", "caption_column",
    "center_crop", "checkpointing_steps", "checkpoints_total_limit", "dataloader_num_workers", "dataset_config_name",
    "dataset_name", "dream_detail_preservation", "dream_training", "enable_xformers_memory_efficient_attention",
    "foreach_ema", "gradient_accumulation_steps", "gradient_checkpointing", "hub_model_id", "hub_token",
    "image_column", "image_interpolation_mode", "input_perturbation", "learning_rate", "local_rank", "logging_dir",
    "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "max_train_samples", "max_train_steps", "mixed_precision",
    "noise_offset", "non_ema_revision", "num_train_epochs", "offload_ema", "output_dir", "prediction_type",
    "pretrained_model_name_or_path", "push_to_hub", "random_flip", "report_to", "resolution",
    "resume_from_checkpoint", "revision", "scale_lr", "seed", "snr_gamma", "tracker_project_name",
    "train_batch_size", "train_data_dir", "use_8bit_adam", "use_ema", "validation_epochs", "validation_prompts",
    "variant", "num_validation_images",
}  # fmt: skip
XL_FLAGS = {"timestep_bias_multiplier"}  # of diffusers' train_text_to_image_sdxl.py, where it needs a strategy


@pytest.fixture
def run(train_run):
    return train_run


STEPS = ["--max_train_steps", 3, "--learning_rate", 1e-3, "--seed", 0]


# --- flags ----------------------------------------------------------------------------------------------------------


def test_every_flag_of_diffusers_script_is_known():
    known = {option.lstrip("-") for action in build_parser()._actions for option in action.option_strings}
    assert not DIFFUSERS_FLAGS - known


def test_beyond_them_there_are_few():
    own = [action.option_strings for action in build_parser()._actions if action.dest != "help"]
    beyond = [names for names in own if not {name.lstrip("-") for name in names} & (DIFFUSERS_FLAGS | XL_FLAGS)]
    assert len(beyond) <= 34, beyond


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--snr_gamma", 5, "--prediction_type", "sample"], "--snr_gamma"),
        (["--dream_training", "--prediction_type", "v_prediction"], "--dream_training"),
        (["--rescale_betas_zero_snr"], "--rescale_betas_zero_snr"),
        (["--use_ema", "--lora_rank", 2], "--use_ema"),
        (["--samples", 9, "--epochs", 2], "--samples and --epochs"),
        (["--samples", 9, "--max_train_steps", 2], "--samples and --max_train_steps"),
        (["--lora_alpha", 2], "--lora_rank"),
        (["--no_cache", "--latents_cache_dir", "x"], "--cache"),
        (["--validation_split", 0.1], "--validation_split"),
        (["--validation_split", 0.5, "--validation_dir", "x"], "--validation_dir"),
        (["--validation_dir", "nowhere"], "nowhere"),
        (["--report_to", "wandb"], "wandb"),
        (["--use_8bit_adam"], "bitsandbytes"),
        (["--caption_column", "caption"], "`caption`"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(run, flags, named, monkeypatch):
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
        if package == "wandb":
            monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=named):
        run("out", *flags)


# --- hub and trackers -----------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_alone(run, monkeypatch, capsys, tmp_path):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, exist_ok):
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **what):
            calls.append(what)

        def file_exists(self, repository, name):
            return False

        def upload_file(self, **what):
            calls.append(what)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("A_SECRET", "of the environment")
    out = run("out", *STEPS, "--report", "--push_to_hub", "--hub_token", "hf_secret", "--hub_model_id", "jeans")
    assert calls[:2] == ["hf_secret", "hf_secret"]  # it is tried before the training
    assert calls[2]["repo_id"] == "me/jeans" and calls[2]["folder_path"] == out
    assert any("checkpoint" in pattern for pattern in calls[2]["ignore_patterns"])
    assert "report.html" in calls[2]["ignore_patterns"]  # it shows the pictures of the data set
    assert "of the environment" not in (out / "report.html").read_text()
    assert calls[3]["path_in_repo"] == "README.md" and b"hf_secret" not in calls[3]["path_or_fileobj"]
    assert "hf_secret" not in capsys.readouterr().out
    for path in out.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_a_token_beside_a_tracker_that_uploads_the_command_line_is_refused():
    with pytest.raises(UserError, match="hf auth login"):
        parse_args(["--dataset", "x", "--hub_token", "hf_secret", "--report_to", "wandb"])
    with pytest.raises(UserError) as error:
        parse_args(["--dataset", "x", "--hub-token=hf_secret"])
    assert "hf_secret" not in str(error.value)


@pytest.mark.usefixtures("few_sampling_steps")
def test_a_tracker_gets_each_step_the_pictures_and_no_token(run):
    pytest.importorskip("tensorboard")
    flags = ["--report_to", "tensorboard", "--hub_token", "hf_secret", "--validation_pictures"]
    out = run("out", *STEPS, *flags)
    events = [path.read_bytes() for path in (out / "logs").rglob("*") if path.is_file()]
    assert events and not any(b"hf_secret" in content for content in events)
    assert any(b"validation/0" in content and b"\x89PNG" in content for content in events)
