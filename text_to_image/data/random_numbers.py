"""Random numbers that follow from a seed and a key alone, whatever was drawn before."""

import hashlib

import torch


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for this key; hashed, since with `seed + n` seed 1's sample 2 would be seed 2's sample 1."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
