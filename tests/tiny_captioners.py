"""Captioners of every family with a few thousand random weights, in folders as the model hub has them."""

import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
)

from captioning.captioners import Chat

QUESTION = "Question: what is it? Answer:"
SPOKEN = (
    f"{QUESTION} {Chat.default_prompt} Describe with a paragraph what is shown in the image. USER ASSISTANT : a blue"
)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
           "<|vision_end|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
           *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "blue", "jeans", "a", "photograph", "of", "red"]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = {"initializer_range": 0.6}  # wide, so that what a model says depends on what it sees


def make_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """One token a word; it puts <s> in front by itself."""
    words = [*SPECIAL, *dict.fromkeys(re.findall(r"\w+|[^\w\s]+", SPOKEN))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(SPECIAL)
    marks = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks, extra_special_tokens=tokens)


def save(folder: Path, model, processor) -> Path:
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = 0, 1
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def text_size(tokenizer, **more) -> dict:
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **ids, **SPREAD, **more}


def make_blip(folder: Path, favourite: str | None = None) -> Path:
    """One that says nothing but `favourite` (a word of BLIP_WORDS), whatever the picture; None: what comes."""
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(BLIP_WORDS))
    tokenizer = BertTokenizer(str(folder / "words.txt"), bos_token="[DEC]")
    tokens = {
        "vocab_size": len(BLIP_WORDS),
        "bos_token_id": 5,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    text = {**SMALL, **SPREAD, **tokens, "encoder_hidden_size": 32, "max_position_embeddings": 64}
    vision = {**SMALL, **SPREAD, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, **SPREAD)
    model = BlipForConditionalGeneration(config)
    if favourite:
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[BLIP_WORDS.index(favourite)] += 1000
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def make_blip2(folder: Path, encoder_decoder: bool = False) -> Path:
    """With OPT, which goes on with the prompt, or with T5, which answers it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    processor = Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4)
    if encoder_decoder:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
        text = T5Config(**text_size(tokenizer, decoder_start_token_id=1), **sizes)
    else:
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_attention_heads": 4}
        text = OPTConfig(**text_size(tokenizer), **sizes, num_hidden_layers=2, init_std=0.6)
    config = Blip2Config(
        vision_config={**SMALL, **SPREAD, "image_size": 32, "patch_size": 8},
        qformer_config={**SMALL, **SPREAD, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)},
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=SPECIAL.index("<image>"), **SPREAD,
    )  # fmt: skip
    return save(folder, Blip2ForConditionalGeneration(config), processor)


def make_florence2(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(image_token="<image>")
    pictures = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    pictures.image_seq_length = 5  # 2 x 2 cells of 32 pixels and their mean
    parses = {"pure_text": {}}
    processor = Florence2Processor(pictures, tokenizer, post_processor_config=parses)
    text = BartConfig(
        **text_size(tokenizer, decoder_start_token_id=2), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.6,
        forced_bos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    vision = {
        "depths": [1, 1, 1, 1], "embed_dim": [8, 16, 16, 32], "num_heads": [1, 2, 2, 4], "num_groups": [1, 2, 2, 4],
        "window_size": 2, "projection_dim": 32, **SPREAD,
    }  # fmt: skip
    image_token = SPECIAL.index("<image>")
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=image_token)
    return save(folder, Florence2ForConditionalGeneration(config), processor)


def llama_size(tokenizer) -> dict:
    return {**SMALL, "num_key_value_heads": 4, **text_size(tokenizer)}


def make_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8, **SPREAD)
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=LlamaConfig(**llama_size(tokenizer)).to_dict(),
        image_token_index=SPECIAL.index("<image>"), **SPREAD,
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return save(folder, LlavaForConditionalGeneration(config), processor)


def make_qwen(folder: Path) -> Path:
    """Its pictures have as many tokens as their size asks for."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    named = {f"{name}_token_id": SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    pads = {f"{name}_token_id": SPECIAL.index(f"<|{name}_pad|>") for name in ("image", "video")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 8, "window_size": 32,
        "out_hidden_size": 32, "fullatt_block_indexes": [1], **SPREAD,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**llama_size(tokenizer), "rope_parameters": rope}, vision_config=vision, **named, **pads, **SPREAD
    )
    sizes = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE.replace("{{ bos_token }}", "").replace(
            "IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"
        ),
    )  # fmt: skip
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def make_idefics3(folder: Path) -> Path:
    """Of the kind of SmolVLM; a large picture is also shown in parts."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Idefics3Config(
        vision_config={**SMALL, **SPREAD, "image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**llama_size(tokenizer)).to_dict(),
        image_token_id=SPECIAL.index("<image>"), scale_factor=2, **SPREAD,
    )  # fmt: skip
    pictures = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    return save(folder, Idefics3ForConditionalGeneration(config), processor)


def pictures() -> list[Image.Image]:
    """Four that differ in shape, size and colour."""
    made = []
    for size, colour in (((64, 64), "navy"), ((96, 40), "red"), ((40, 96), "green"), ((24, 30), "black")):
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((4, 4, size[0] // 2, size[1] - 8), fill=colour)
        made.append(image)
    return made
