"""Models that caption pictures, by family: BLIP, BLIP-2, Florence-2, and every chat model with vision.

A family knows how its models are prompted and how their output is decoded. captioner_loading finds the family of a
model from its config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import (
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
    PreTrainedModel,
)

from captioning.lengths import whole_sentences
from runtime.errors import UserError, WorkError, is_out_of_memory


@dataclass
class Captioner:
    """A model and its processor. It decodes without sampling, so that a picture always gets the same caption."""

    model: PreTrainedModel
    processor: Any  # ProcessorMixin, but each family's has methods of its own
    prompt: str | None
    max_new_tokens: int
    max_batch_size: int | None = None  # None until a batch was too large for the memory

    model_class: ClassVar[Any] = AutoModelForImageTextToText
    processor_class: ClassVar[Any] = AutoProcessor
    default_prompt: ClassVar[str | None] = None
    default_max_new_tokens: ClassVar[int] = 60
    generation_settings: ClassVar[dict[str, Any]] = {"num_beams": 1, "do_sample": False}
    no_caption_message: ClassVar[str] = "the model found no words for it"

    @classmethod
    def check_prompt(cls, prompt: str | None) -> None:
        """UserError where models of this family cannot be given the prompt."""

    @classmethod
    def prepare_processor(cls, name: str, processor: Any) -> None:
        """Changes the processor to this family's needs; UserError where the model `name` does not suit the family."""

    @torch.inference_mode()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption for each image (RGB, of any size); an empty one where the model says nothing.

        A batch that is too large for the memory is halved, and so are later ones. WorkError where one image is too
        much.
        """
        captions: list[str] = []
        while rest := images[len(captions) :]:
            batch = rest[: self.max_batch_size]
            if (found := self._caption_batch(batch)) is not None:
                captions += found
                continue
            if len(batch) == 1:
                raise WorkError("not enough memory for a single picture; a smaller --model needs less")
            self.max_batch_size = len(batch) // 2
            torch.cuda.empty_cache()
        return captions

    def _caption_batch(self, images: Sequence[Image.Image]) -> list[str] | None:
        """None where there is not enough memory for so many."""
        try:
            inputs = self.prepare_inputs(list(images)).to(self.model.device, self.model.dtype)
            model: Any = self.model  # transformers types `generate` as a Tensor
            tokens = model.generate(**inputs, max_new_tokens=self.max_new_tokens, **self.generation_settings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return [" ".join(text.split()) for text in self.decode_captions(inputs, tokens)]

    def prepare_inputs(self, images: list[Image.Image]) -> BatchFeature:
        """The model's inputs for these images."""
        raise NotImplementedError

    def decode_captions(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        """The captions in the generated token ids, (B, L)."""
        raise NotImplementedError

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        return self.processor.batch_decode(tokens, skip_special_tokens=skip_special_tokens)


class Blip(Captioner):
    """Li et al. 2022, arXiv:2201.12086. A prompt is how the caption begins."""

    model_class = BlipForConditionalGeneration
    processor_class = BlipProcessor

    def prepare_inputs(self, images: list[Image.Image]) -> BatchFeature:
        text = {"text": [self.prompt] * len(images)} if self.prompt else {}
        return self.processor(images=images, return_tensors="pt", **text)

    def decode_captions(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        return self.decode(tokens)


class Blip2(Blip):
    """Li et al. 2023, arXiv:2301.12597. A prompt comes before the caption, as 'Question: ... Answer:' does."""

    model_class = Blip2ForConditionalGeneration
    processor_class = Blip2Processor

    def decode_captions(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        return self.decode(_new_tokens(inputs, tokens))


class Florence2(Captioner):
    """Xiao et al. 2023, arXiv:2311.06242. Its prompts are the names of a few tasks."""

    model_class = Florence2ForConditionalGeneration
    processor_class = Florence2Processor
    default_prompt = "<MORE_DETAILED_CAPTION>"
    default_max_new_tokens = 256
    generation_settings: ClassVar[dict[str, Any]] = {"do_sample": False}  # its own config has the number of beams
    tasks: ClassVar[tuple[str, ...]] = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")

    @classmethod
    def check_prompt(cls, prompt: str | None) -> None:
        if prompt and prompt not in cls.tasks:
            raise UserError(f"--prompt {prompt!r}: the prompts of Florence-2 are {', '.join(cls.tasks)}")

    def prepare_inputs(self, images: list[Image.Image]) -> BatchFeature:
        return self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")

    def decode_captions(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        # Special tokens hold places in the picture, which post_process_generation takes out.
        texts = self.decode(tokens, skip_special_tokens=False)
        return [self._parse(text.replace(self.processor.tokenizer.pad_token, "")) for text in texts]

    def _parse(self, text: str) -> str:
        return self.processor.post_process_generation(text, task=self.prompt)[self.prompt]


class Chat(Captioner):
    """Any model that answers a question about a picture in a chat: Qwen-VL, SmolVLM, LLaVA, Gemma and others."""

    default_prompt: ClassVar[str] = (
        "Write one caption for this picture, to train a text-to-image model on it. Say what it shows, its colour, "
        "material and details, how it is placed, from which side it is seen, and the background. Plain sentences, "
        "nothing that cannot be seen, no introduction, no list."
    )
    default_max_new_tokens = 200
    no_caption_message = (
        f"{Captioner.no_caption_message}, or did not finish its reasoning before the answer: a higher "
        "--max_new_tokens gives it time"
    )

    @classmethod
    def prepare_processor(cls, name: str, processor: Any) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        if not template or tokenizer is None:
            raise UserError(
                f"--model {name}: has no chat template; a BLIP, BLIP-2 or Florence-2 captioner or a chat model with "
                "vision is needed"
            )
        processor.chat_template = template
        _chat_prompt(processor, cls.default_prompt)  # raises now what it would raise later
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def prepare_inputs(self, images: list[Image.Image]) -> BatchFeature:
        text = _chat_prompt(self.processor, self.prompt)
        start = self.processor.tokenizer.bos_token
        # A template that writes the start token itself, or it would be there twice.
        special = {"add_special_tokens": False} if start and text.startswith(start) else {}
        return self.processor(
            text=[text] * len(images),
            images=[[image] for image in images],
            padding=True,
            return_tensors="pt",
            **special,
        )

    def decode_captions(self, inputs: BatchFeature, tokens: torch.Tensor) -> list[str]:
        tokens = _new_tokens(inputs, tokens)
        reasoning_begun = _chat_prompt(self.processor, self.prompt).rstrip().endswith("<think>")
        texts = [_without_quotes(_without_reasoning(text, reasoning_begun)) for text in self.decode(tokens)]
        # A text cut off at --max_new_tokens is cut back to its last whole sentence.
        ended = torch.isin(tokens[:, -1], torch.tensor(self._end_tokens(), device=tokens.device)).tolist()
        return [text if end else whole_sentences(text) for text, end in zip(texts, ended, strict=True)]

    def _end_tokens(self) -> list[int]:
        config: Any = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return [token for token in [*ends, self.processor.tokenizer.pad_token_id] if token is not None]


class RemoteCodeChat(Chat):
    """A chat model that brings its own code and registers it as a causal language model."""

    model_class = AutoModelForCausalLM


def _chat_prompt(processor: Any, prompt: str | None) -> str:
    """The prompt about one picture, in the model's own chat template."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _without_reasoning(text: str, begun: bool) -> str:
    """The answer after the reasoning; empty where that did not end. `begun`: the prompt ends with its start mark."""
    _, end, answer = text.rpartition("</think>")
    unfinished = not end and (begun or answer.lstrip().startswith("<think>"))
    return "" if unfinished else answer.strip()


def _without_quotes(text: str) -> str:
    """Without quotation marks around the whole text; marks around parts of it stay."""
    return text[1:-1] if text[:1] == text[-1:] == '"' and text.count('"') == 2 else text


def _new_tokens(inputs: BatchFeature, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens without the prompt's, which decoder-only models return as well."""
    prompt = inputs.get("input_ids")
    if prompt is None or not torch.equal(tokens[:, : prompt.shape[1]], prompt):
        return tokens
    return tokens[:, prompt.shape[1] :]
