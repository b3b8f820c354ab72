"""Captions that are lists of tags: their order is shuffled and some are left out, the first may stay."""

from dataclasses import dataclass

import torch

from data.caption_variants import SENTENCE_END
from data.random_numbers import keyed_generator

TAG_ORDERS = 16  # of each caption; each is encoded once and kept


def split_tags(caption: str) -> list[str]:
    """The tags of 'denim jeans, blue, folded'; none where the caption has no comma, or is of sentences."""
    is_sentence = caption.rstrip().endswith((".", "!", "?")) or SENTENCE_END.search(caption)
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    return tags if len(tags) > 1 and not is_sentence else []


@dataclass(frozen=True)
class TagSettings:
    """How lists of tags are read; the first `keep` tags stay where they are."""

    shuffle: bool
    keep: int
    dropout: float  # the probability with which each of the other tags is left out
    seed: int

    def variants(self, caption: str) -> tuple[str, ...]:
        """What samples choose from, each equally often: 16 orders, with repeats; empty where there are no tags.

        They follow from the seed and the caption, so pictures with the same caption share them.
        """
        if not (tags := split_tags(caption)):
            return ()
        generator = keyed_generator(self.seed, "tags", caption)
        orders = tuple(", ".join(self._arranged(tags, generator)) for _ in range(TAG_ORDERS))
        return orders if len(set(orders)) > 1 else orders[:1]

    def _arranged(self, tags: list[str], generator: torch.Generator) -> list[str]:
        kept, others = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            others = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
        drawn = torch.rand(len(others), generator=generator).tolist()
        arranged = [*kept, *(tag for tag, number in zip(others, drawn, strict=True) if number >= self.dropout)]
        return arranged or [others[int(torch.randint(len(others), (), generator=generator))]]  # never no tag at all
