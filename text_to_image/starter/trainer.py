"""AdamW on fp32 weights through a bf16 copy on a GPU, for stages whose length is a time."""

import copy
import math
from collections.abc import Iterable

import torch


class Trainer:
    """AdamW on fp32 weights; a model whose gradients come from a bf16 copy; their EMA; a schedule by time."""

    def __init__(
        self, masters: Iterable, weights: Iterable, learning_rate: float, warm_up: int, ema_decay: float | None = None
    ):
        """`weights` are those that the loss is computed with: the masters themselves, or bf16 copies of them."""
        self.masters, self.weights = list(masters), list(weights)
        self.copies = [(m, w) for m, w in zip(self.masters, self.weights, strict=True) if m is not w]
        for master, _ in self.copies:
            master.grad = torch.zeros_like(master)
        fused = self.masters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.masters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.learning_rate, self.warm_up, self.ema_decay, self.steps = learning_rate, warm_up, ema_decay, 0
        self.ema = None if ema_decay is None else [p.detach().clone() for p in self.masters]

    def step(self, loss: torch.Tensor, done: float) -> None:
        """One step; `done` is the share of the stage that is over: the learning rate follows a cosine to 0."""
        warm = min(1, (self.steps + 1) / self.warm_up)
        self.optimizer.param_groups[0]["lr"] = (
            self.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        )
        self.optimizer.zero_grad(set_to_none=not self.copies)
        loss.backward()
        if self.copies:
            torch._foreach_copy_([m.grad for m, _ in self.copies], [w.grad for _, w in self.copies])
            for _, weight in self.copies:
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if self.copies:
                torch._foreach_copy_([w for _, w in self.copies], [m for m, _ in self.copies])
            if self.ema is not None:
                decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
                torch._foreach_lerp_(self.ema, self.masters, 1 - decay)
        self.steps += 1

    def state(self) -> dict:
        """All but the weights, which are kept with their model."""
        return {"optimizer": self.optimizer.state_dict(), "ema": self.ema, "steps": self.steps}

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            torch._foreach_copy_(self.ema, state["ema"])
        self.steps = state["steps"]


def fast_copy(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A bf16 copy for a GPU; on the CPU the module itself."""
    if device == "cpu":
        return module
    return copy.deepcopy(module).to(torch.bfloat16, memory_format=torch.channels_last)
