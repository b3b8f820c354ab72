"""The base's own pictures."""

import torch

from models.loading import load_prompt_encoder, load_unet
from models.samplers import SamplingSettings
from models.sampling import load_sampler
from models.text_encoding import TextEmbedding
from training.plan import prior_batch_size, repeat_prompts
from training.prior import PriorGenerator, read_prior, write_prior


def test_half_as_many_as_data_set_pictures_join_each_batch_rounded_up():
    assert [prior_batch_size(batch, 8) for batch in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert prior_batch_size(4, 0) == 0


def test_prompts_take_turns():
    assert repeat_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert repeat_prompts(["a", "b"], 0) == []


def test_a_picture_is_the_same_whichever_process_generates_it(tiny_model):
    encoder, settings = load_prompt_encoder(tiny_model, 3), SamplingSettings(20, 4.0)
    prompts = repeat_prompts(["a red t-shirt", "the white " * 50], 3)
    text = {prompt: encoder(prompt) for prompt in ["", *prompts]}

    def generate(indices) -> dict[int, torch.Tensor]:
        unet, sampler = load_unet(tiny_model).eval(), load_sampler(tiny_model)
        prior = PriorGenerator(unet, sampler, prompts, text, (4, 8, 8), (16, 16), settings)
        return prior.generate(0, indices, quiet=True)

    together, apart = generate(range(3)), {**generate(range(0, 3, 2)), **generate(range(1, 3, 2))}
    assert together.keys() == apart.keys()
    assert all(torch.allclose(together[i], apart[i], atol=1e-4) for i in together)
    assert not torch.allclose(together[0], together[2], atol=0.1)  # one prompt, two seeds


def test_its_prompt_and_the_empty_prompt_guide_each_picture(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "training.prior.generate_latents", lambda unet, sampler, noise, conditions, _: seen.append(conditions) or noise
    )
    embeddings = {
        prompt: TextEmbedding(torch.full((3, 1), i), torch.full((1,), i)) for i, prompt in enumerate(["", "a", "b"])
    }
    settings = SamplingSettings(20, 4.0)
    PriorGenerator(None, None, ["a", "b"], embeddings, (1, 2, 2), (16, 24), settings).generate(0, range(2), quiet=True)
    [conditions] = seen
    assert conditions.pooled.flatten().tolist() == [0, 0, 1, 2]  # the empty ones first
    assert conditions.hidden_states[:, 0, 0].tolist() == [0, 0, 1, 2]
    assert conditions.time_ids.tolist() == [[16, 24, 0, 0, 16, 24]] * 4


def test_they_are_read_back_in_order_and_nothing_where_none_were_generated(tmp_path):
    folder = tmp_path / "cache" / "prior"
    assert read_prior(folder, "key", 12) is None
    write_prior(folder, "key", {i: torch.full((1, 2, 2), float(i)) for i in reversed(range(12))})
    assert [latent[0, 0, 0].item() for latent in read_prior(folder, "key", 12)] == list(range(12))
    assert read_prior(folder, "another", 12) is None


def test_a_damaged_file_counts_as_none(tmp_path):
    write_prior(tmp_path, "key", {0: torch.ones(1, 2, 2)})
    [path] = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_prior(tmp_path, "key", 1) is None
