"""Models that caption pictures, by family: BLIP, BLIP-2, Florence-2, and every chat model with vision.

A family knows how its models are asked and how their answers are read; which one a model belongs to stands in its
config.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from captioning.lengths import whole_sentences
from runtime.devices import best_mixed_precision, choose_device
from runtime.errors import UserError, WorkError, advice_for, first_line, hub_error_reason, is_out_of_memory

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
PRECISIONS = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Captioner:
    """A model and its processor. It searches and never draws, so that a picture always gets the same caption."""

    model: PreTrainedModel
    processor: ProcessorMixin
    prompt: str | None
    max_new_tokens: int
    at_once: int | None = None  # images that there is memory for; None: no bound is known

    model_class: ClassVar = AutoModelForImageTextToText
    processor_class: ClassVar = AutoProcessor
    usual_prompt: ClassVar[str | None] = None
    usual_tokens: ClassVar[int] = 60
    search: ClassVar[dict] = {"num_beams": 1, "do_sample": False}
    no_words: ClassVar[str] = "the model found no words for it"

    @classmethod
    def check_prompt(cls, prompt: str | None) -> None:
        """UserError where models of this family cannot be asked that."""

    @classmethod
    def check_processor(cls, name: str, processor: ProcessorMixin) -> None:
        """Readies the processor; UserError where the model `name` cannot be asked as this family is."""

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each image (RGB, of any size); an empty one where the model finds no words.

        In parts, from then on, where they are too many at once for the memory; WorkError where one is too many.
        """
        texts: list[str] = []
        while rest := images[len(texts) :]:
            part = rest[: self.at_once]
            if (found := self._answers_to(part)) is not None:
                texts += found
                continue
            if len(part) == 1:
                raise WorkError("not enough memory for a single picture; a smaller --model needs less")
            self.at_once = len(part) // 2
            torch.cuda.empty_cache()
        return texts

    def _answers_to(self, images: Sequence[Image.Image]) -> list[str] | None:
        """None where the memory does not suffice for so many at once."""
        try:
            inputs = self.ask(list(images)).to(self.model.device, self.model.dtype)
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **self.search)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return [" ".join(text.split()) for text in self.read(inputs, tokens)]

    def ask(self, images: list[Image.Image]) -> BatchFeature:
        """What the model is given for these images."""
        raise NotImplementedError

    def read(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        """The captions in what the model has answered, (B, L) token ids."""
        raise NotImplementedError

    def decode(self, tokens: torch.Tensor, **settings) -> list[str]:
        return self.processor.batch_decode(tokens, **{"skip_special_tokens": True, **settings})


class Blip(Captioner):
    """Li et al. 2022, arXiv:2201.12086. A prompt is how the caption begins."""

    model_class = BlipForConditionalGeneration
    processor_class = BlipProcessor

    def ask(self, images: list[Image.Image]) -> BatchFeature:
        words = {"text": [self.prompt] * len(images)} if self.prompt else {}
        return self.processor(images=images, return_tensors="pt", **words)

    def read(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        return self.decode(tokens)


class Blip2(Blip):
    """Li et al. 2023, arXiv:2301.12597. A prompt stands before the caption, as 'Question: ... Answer:' does."""

    model_class = Blip2ForConditionalGeneration
    processor_class = Blip2Processor

    def read(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        return self.decode(_without_question(inputs, tokens))


class Florence2(Captioner):
    """Xiao et al. 2023, arXiv:2311.06242. It knows a few tasks by name and can be asked nothing else."""

    model_class = Florence2ForConditionalGeneration
    processor_class = Florence2Processor
    usual_prompt = "<MORE_DETAILED_CAPTION>"
    usual_tokens = 256
    search: ClassVar[dict] = {"do_sample": False}  # its own generation config says with how many beams
    tasks: ClassVar[tuple[str, ...]] = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")

    @classmethod
    def check_prompt(cls, prompt: str | None) -> None:
        if prompt and prompt not in cls.tasks:
            raise UserError(f"--prompt {prompt!r}: Florence-2 answers to {', '.join(cls.tasks)} and to nothing else")

    def ask(self, images: list[Image.Image]) -> BatchFeature:
        return self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")

    def read(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        texts = self.decode(tokens, skip_special_tokens=False)  # what it places in the picture is in special tokens
        return [self._parse(text.replace(self.processor.tokenizer.pad_token, "")) for text in texts]

    def _parse(self, text: str) -> str:
        return self.processor.post_process_generation(text, task=self.prompt)[self.prompt]


class Chat(Captioner):
    """Any model that answers a question about a picture in a chat: Qwen-VL, SmolVLM, LLaVA, Gemma and their like."""

    usual_prompt = (
        "Write one caption for this picture, to train a text-to-image model on it. Say what it shows, its colour, "
        "material and details, how it is placed, from which side it is seen, and the background. Plain sentences, "
        "nothing that cannot be seen, no introduction, no list."
    )
    usual_tokens = 200
    no_words = (
        f"{Captioner.no_words}, or came to no end with what it thinks before it answers: a higher --max_new_tokens "
        "gives it time"
    )

    @classmethod
    def check_processor(cls, name: str, processor: ProcessorMixin) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if not template:
            raise UserError(
                f"--model {name}: has no chat template; a BLIP, BLIP-2 or Florence-2 captioner or a chat model with "
                "vision is needed"
            )
        processor.chat_template = template
        _question(processor, cls.usual_prompt)  # raises now what it would raise later
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def ask(self, images: list[Image.Image]) -> BatchFeature:
        text = _question(self.processor, self.prompt)
        start = self.processor.tokenizer.bos_token
        marks = {"add_special_tokens": False} if start and text.startswith(start) else {}  # or it would begin twice
        return self.processor(
            text=[text] * len(images), images=[[image] for image in images], padding=True, return_tensors="pt", **marks
        )

    def read(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        tokens = _without_question(inputs, tokens)
        thinks = _question(self.processor, self.prompt).rstrip().endswith("<think>")
        texts = [_without_quotes(_without_thoughts(text, thinks)) for text in self.decode(tokens)]
        # One that was cut at --max_new_tokens ends with its last whole sentence.
        ended = torch.isin(tokens[:, -1], torch.tensor(self._end_tokens(), device=tokens.device)).tolist()
        return [text if end else whole_sentences(text) for text, end in zip(texts, ended, strict=True)]

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return [token for token in [*ends, self.processor.tokenizer.pad_token_id] if token is not None]


class ChatOfItsOwn(Chat):
    """A chat model whose code comes with it and names the class as one of text."""

    model_class = AutoModelForCausalLM


FAMILIES = {"blip": Blip, "blip-2": Blip2, "florence2": Florence2}  # all others: Chat


def _question(processor: ProcessorMixin, prompt: str) -> str:
    """What a chat model is asked about one picture, in its own template."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _without_thoughts(text: str, begun: bool) -> str:
    """What was said after thinking; nothing where that came to no end. `begun`: the question has begun it."""
    _, end, answer = text.rpartition("</think>")
    unfinished = not end and (begun or answer.lstrip().startswith("<think>"))
    return "" if unfinished else answer.strip()


def _without_quotes(text: str) -> str:
    """Without the marks round all of it, but with those of two things that are quoted in it."""
    return text[1:-1] if text[:1] == text[-1:] == '"' and text.count('"') == 2 else text


def _without_question(inputs: BatchFeature, tokens: torch.Tensor) -> torch.Tensor:
    """Only what was answered: a decoder-only model goes on with what it was given, and gives back both."""
    question = inputs.get("input_ids")
    if question is None or not torch.equal(tokens[:, : question.shape[1]], question):
        return tokens
    return tokens[:, question.shape[1] :]


def load_captioner(
    name: str, prompt: str | None = None, max_new_tokens: int | None = None, *,
    allow_pickle: bool = False, trust_remote_code: bool = False,
) -> Captioner:  # fmt: skip
    """The captioner `name`, a folder or a hub id; UserError where it cannot be loaded, with what to do.

    In half precision on a GPU, else in fp32. Without `allow_pickle` from safetensors only. WorkError where it is too
    large for the memory.
    """
    _quiet_transformers()
    try:
        family = _family_of(name, trust_remote_code)
        family.check_prompt(prompt)
        trust = {"trust_remote_code": True} if trust_remote_code else {}
        processor = family.processor_class.from_pretrained(name, **trust)
        family.check_processor(name, processor)
        model = family.model_class.from_pretrained(
            name, dtype=PRECISIONS[best_mixed_precision()], use_safetensors=None if allow_pickle else True, **trust
        ).to(choose_device())
    except UserError:
        raise
    except Exception as error:  # the hub's errors and those of broken configs have no common class
        if is_out_of_memory(error):
            raise WorkError(f"--model {name} does not fit into the memory; a smaller one is needed") from None
        if advice_for(error):
            raise
        raise UserError(_what_to_do(name, error, allow_pickle)) from None
    if not model.config.is_encoder_decoder:
        processor.tokenizer.padding_side = "left"  # what a model goes on with stands at the end
    tokens = max_new_tokens or family.usual_tokens
    return family(model.eval(), processor, prompt or family.usual_prompt, tokens)


def _family_of(name: str, trust_remote_code: bool) -> type[Captioner]:
    """UserError where the model's config says that it captions no pictures, or needs code of its own."""
    config, _ = PretrainedConfig.get_config_dict(name)
    model_type, own_code = config.get("model_type"), config.get("auto_map", {})
    if own_code and model_type == "florence2":
        community = f"florence-community/{Path(name).name}"
        raise UserError(f"--model {name}: in a format whose code no longer runs; the same model is {community}")
    if own_code and model_type not in CONFIG_MAPPING:
        if not trust_remote_code:
            raise UserError(
                f"--model {name}: brings code of its own; --trust_remote_code runs it, only where you trust its maker"
            )
        return Chat if "AutoModelForImageTextToText" in own_code else ChatOfItsOwn
    wrong_head = model_type in FAMILIES and not _generates(config)
    if wrong_head or type(AutoConfig.from_pretrained(name)) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = (config.get("architectures") or [model_type])[0]
        raise UserError(f"--model {name}: of type {kind!r}, which captions no pictures")
    return FAMILIES.get(model_type, Chat)


def _generates(config: dict) -> bool:
    """Of BLIP and its like there are kinds that answer questions or match texts, whose words would be random here."""
    architectures = config.get("architectures") or ["ForConditionalGeneration"]
    return any(architecture.endswith("ForConditionalGeneration") for architecture in architectures)


def _what_to_do(name: str, error: Exception, allow_pickle: bool) -> str:
    said = f"cannot load a captioner from --model {name}: {first_line(error)}"
    if isinstance(error, ImportError):  # they say what to install
        return said
    if Path(name).is_dir():
        pickles = not allow_pickle and any(Path(name).glob("*.bin")) and not any(Path(name).glob("*.safetensors"))
        return f"{said}; --allow_pickle reads its pickles: only where you trust its maker" if pickles else said
    if not HUB_ID.fullmatch(name):
        return f"{said}; there is no such folder, and a model of the hub is named owner/name"
    if re.search(r"gated|\b40[13]\b", str(error)):
        return (
            f"{said}; accept its terms on https://huggingface.co/{name}, then `hf auth login`; and see that "
            "the name is right"
        )
    return (
        f"{said}; without internet: `hf download {name}` on a machine that has it, then --model with the folder that "
        f"it prints, or CAPTIONER={name} bash job.sh setup"
    )


def _quiet_transformers() -> None:
    """Keeps its bars and remarks out of the output; downloads still show."""
    unwanted = are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    if not unwanted:
        enable_progress_bars()  # transformers has disabled the hub's with its own; some wait minutes for gigabytes


def download_captioner(name: str, whole: bool = False) -> Path:
    """Into the hub's cache, for a job without internet; `whole`: with pickles and code. UserError where it is not to
    be had."""
    import huggingface_hub

    try:
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=None if whole else patterns))
    except Exception as error:  # the hub's errors have no common class
        raise UserError(f"CAPTIONER {name}: not to be had from the hub: {hub_error_reason(error)}") from None
