"""Loads a captioner: finds its family in its config, and says what to do where it cannot be loaded."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from captioning.captioners import Blip, Blip2, Captioner, Chat, Florence2, RemoteCodeChat
from runtime.devices import best_mixed_precision, choose_device
from runtime.errors import UserError, WorkError, advice_for, is_out_of_memory
from runtime.hub import (
    asking_hub,
    hub_error,
    hub_error_reason,
    hub_status,
    is_passing,
    refuse_missing_path,
    waiting_for_hub,
)

FAMILIES: dict[str, type[Captioner]] = {"blip": Blip, "blip-2": Blip2, "florence2": Florence2}  # all others: Chat
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
CAPTIONER_DTYPES = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_captioner(
    name: str,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Captioner:
    """The captioner `name`, a folder or a hub id, in half precision on a GPU and in fp32 elsewhere.

    Weights load from safetensors only, unless `allow_pickle`. Raises UserError that says what to do where it cannot be
    loaded, WorkError where it does not fit into the memory.
    """
    _quiet_transformers()
    if not Path(name).exists():
        refuse_missing_path(f"--model {name}", name)
    try:
        with waiting_for_hub():
            family = _find_family(name, trust_remote_code)
            family.check_prompt(prompt)
            trust = {"trust_remote_code": True} if trust_remote_code else {}
            processor = family.processor_class.from_pretrained(name, **trust)
            family.prepare_processor(name, processor)
            model = _load_model(family, name, allow_pickle, trust)
    except UserError:
        raise
    except Exception as error:  # the hub's errors and those of broken configs have no common class
        raise _loading_error(name, error, allow_pickle) from None
    if not model.config.is_encoder_decoder:
        processor.tokenizer.padding_side = "left"  # the model continues at the end
    tokens = max_new_tokens or family.default_max_new_tokens
    return family(model, processor, prompt or family.default_prompt, tokens)


def _load_model(family: type[Captioner], name: str, allow_pickle: bool, trust: dict[str, bool]) -> PreTrainedModel:
    dtype, safetensors = CAPTIONER_DTYPES[best_mixed_precision()], None if allow_pickle else True
    model = family.model_class.from_pretrained(name, dtype=dtype, use_safetensors=safetensors, **trust)
    return model.to(choose_device()).eval()


def _find_family(name: str, trust_remote_code: bool) -> type[Captioner]:
    """UserError where the model's config says that it does not caption pictures, or needs its own code."""
    config, _ = PretrainedConfig.get_config_dict(name)
    model_type, own_code = str(config.get("model_type")), config.get("auto_map", {})
    if own_code and model_type == "florence2":
        community = f"florence-community/{Path(name).name}"
        raise UserError(f"--model {name}: in a format whose code no longer runs; the same model is {community}")
    if own_code and model_type not in CONFIG_MAPPING:
        if not trust_remote_code:
            raise UserError(
                f"--model {name}: brings code of its own; --trust_remote_code runs it, only where you trust its maker"
            )
        return Chat if "AutoModelForImageTextToText" in own_code else RemoteCodeChat
    wrong_head = model_type in FAMILIES and not _generates_captions(config)
    if wrong_head or type(AutoConfig.from_pretrained(name)) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = (config.get("architectures") or [config.get("model_type")])[0]
        raise UserError(f"--model {name}: of type {kind!r}, which does not caption pictures")
    return FAMILIES.get(model_type, Chat)


def _generates_captions(config: dict[str, Any]) -> bool:
    """Not so BLIP models that answer questions or match texts: their captions would come from random weights."""
    architectures = config.get("architectures") or ["ForConditionalGeneration"]
    return any(architecture.endswith("ForConditionalGeneration") for architecture in architectures)


def _loading_error(name: str, error: Exception, allow_pickle: bool) -> Exception:
    """What to raise instead of `error`; itself where its own message is advised on elsewhere."""
    if is_out_of_memory(error):
        return WorkError(f"--model {name} does not fit into the memory; a smaller one is needed")
    if advice_for(error):
        return error
    asked = f"cannot load a captioner from --model {name}"
    if hub_status(error):
        return hub_error(asked, error)
    kind = WorkError if is_passing(error) else UserError
    return kind(_loading_advice(name, error, allow_pickle, f"{asked}: {hub_error_reason(error)}"))


def _loading_advice(name: str, error: Exception, allow_pickle: bool, message: str) -> str:
    if isinstance(error, ImportError):  # it says what to install
        return message
    if Path(name).is_dir():
        pickles = not allow_pickle and any(Path(name).glob("*.bin")) and not any(Path(name).glob("*.safetensors"))
        return f"{message}; --allow_pickle reads its pickles: only where you trust its maker" if pickles else message
    if not HUB_ID.fullmatch(name):
        return f"{message}; there is no such folder, and a model of the hub is named owner/name"
    return (
        f"{message}; without internet: `hf download {name}` on a machine that has it, then --model with the folder "
        f"that it prints, or CAPTIONER={name} bash job.sh setup"
    )


def _quiet_transformers() -> None:
    """Silences transformers' progress bars and remarks, but not the hub's download bars."""
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    if hub_bars:
        enable_progress_bars()  # transformers has disabled the hub's with its own; a download can take minutes


def download_captioner(name: str, whole: bool = False) -> Path:
    """Downloads a captioner into the hub's cache, for a job without internet; `whole`: with pickles and code.

    Raises UserError where it cannot be had.
    """
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
    refuse_missing_path(f"CAPTIONER {name}", name)
    with asking_hub(f"CAPTIONER {name}: not available from the hub"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=None if whole else patterns))
