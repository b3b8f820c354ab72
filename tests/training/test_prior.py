"""The base's own pictures."""

import torch

from models.loading import load_text_encoder, load_tokenizer, load_unet
from models.sampling import load_sampler
from models.text_encoding import encode_prompt
from training.plan import prior_batch_size, repeat_prompts
from training.prior import PriorGenerator, read_prior, write_prior


def test_half_as_many_as_data_set_pictures_join_each_batch_rounded_up():
    assert [prior_batch_size(batch, 8) for batch in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert prior_batch_size(4, 0) == 0


def test_prompts_take_turns():
    assert repeat_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert repeat_prompts(["a", "b"], 0) == []


def test_a_picture_is_the_same_whichever_process_generates_it(tiny_model):
    tokenizer, text_encoder = load_tokenizer(tiny_model), load_text_encoder(tiny_model)
    prompts = repeat_prompts(["a red t-shirt", "the white " * 50], 3)
    text = {prompt: encode_prompt(tokenizer, text_encoder, prompt, 3) for prompt in ["", *prompts]}

    def generate(indices) -> dict[int, torch.Tensor]:
        unet, sampler = load_unet(tiny_model).eval(), load_sampler(tiny_model)
        return PriorGenerator(unet, sampler, prompts, text, (4, 8, 8), 4.0).generate(0, indices, quiet=True)

    together, apart = generate(range(3)), {**generate(range(0, 3, 2)), **generate(range(1, 3, 2))}
    assert together.keys() == apart.keys()
    assert all(torch.allclose(together[i], apart[i], atol=1e-4) for i in together)
    assert not torch.allclose(together[0], together[2], atol=0.1)  # one prompt, two seeds


def test_its_prompt_and_the_empty_prompt_guide_each_picture(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "training.prior.generate_latents", lambda unet, sampler, noise, embeddings, _: seen.append(embeddings) or noise
    )
    embeddings = {"": 0, "a": 1, "b": 2}
    PriorGenerator(None, None, ["a", "b"], embeddings, (1, 2, 2), 4.0).generate(0, range(2), quiet=True)
    assert seen == [[(1, 0), (2, 0)]]


def test_they_are_read_back_in_order_and_nothing_where_none_were_generated(tmp_path):
    path = tmp_path / "cache" / "prior.safetensors"
    assert read_prior(path) is None
    write_prior(path, {i: torch.full((1, 2, 2), float(i)) for i in reversed(range(12))})
    assert [latent[0, 0, 0].item() for latent in read_prior(path)] == list(range(12))


def test_a_damaged_file_counts_as_none(tmp_path):
    path = tmp_path / "prior.safetensors"
    write_prior(path, {0: torch.ones(1, 2, 2)})
    path.write_bytes(path.read_bytes()[:-1])
    assert read_prior(path) is None
