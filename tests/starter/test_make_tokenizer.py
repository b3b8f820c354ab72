"""The starter's tokenizer keeps what the words of captions need, and nothing that only the source code says."""

import re

import numpy as np

from describe import caption_of
from make_tokenizer import caption_words, merges_for
from render_garments import sample_spec


def test_every_word_of_captions_is_kept_and_no_word_of_the_code():
    words = caption_words()
    for seed in range(20_000, 20_300):
        for kind in (None, "jeans"):
            caption = caption_of(sample_spec(seed, kind), np.random.default_rng(seed))
            assert set(re.findall(r"[a-z]+", caption.lower())) <= words, caption
    assert {"denim", "turquoise", "trouser", "drawstrings"} <= words
    assert not words & {"lambda", "numpy", "metadata", "supersample"}


def test_a_word_is_built_by_its_merges_in_the_order_of_their_ranks():
    ranks = {("a", "b"): 2, ("b", "c</w>"): 1, ("a", "bc</w>"): 3}
    assert merges_for("abc", ranks) == [("b", "c</w>"), ("a", "bc</w>")]
