"""The optimizer: which one, made, and its state loaded."""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from optimization.adafactor import Adafactor
from optimization.stochastic_rounding import StochasticAdamW
from runtime.errors import UserError


def find_optimizer_class(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    """What --optimizer and the precision ask for; UserError where bitsandbytes is needed and not installed."""
    if args.optimizer == "adafactor":
        return Adafactor
    if args.mixed_precision == "pure_bf16":  # parse_args has refused the 8-bit one
        return StochasticAdamW
    if args.optimizer == "adamw":
        return functools.partial(torch.optim.AdamW, fused=True)  # one kernel over all tensors
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--optimizer adamw8bit needs bitsandbytes: `pip install bitsandbytes`") from None
    return AdamW8bit


def make_optimizer(
    args: argparse.Namespace, parameters: Sequence[torch.nn.Parameter], seed: int
) -> torch.optim.Optimizer:
    """What `args` ask for; `seed` is that of the stochastic rounding, where there is any."""
    kind = find_optimizer_class(args)
    settings: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if kind is not Adafactor:
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if kind in (Adafactor, StochasticAdamW):
        settings |= {"seed": seed}
    return kind(parameters, **settings)


@contextlib.contextmanager
def skipping_if(
    non_finite: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> Iterator[None]:
    """For a step of `optimizer`: where `non_finite`, a bool on the device, is true, `parameters` stay as they are.

    Without waiting for the GPU: the fused AdamW gets it as `found_inf`, as from the fp16 scaler. Any other optimizer
    gets gradients of zero, which its averages bear, and the parameters are put back.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = non_finite.float()  # type: ignore[attr-defined]
        yield
        return
    with torch.no_grad():
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(non_finite, 0.0)
    yield
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(torch.where(non_finite, old, parameter))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads the state, and gives Adam's averages the memory layout of their weights, in which the fused AdamW reads
    them: a checkpoint may come from a device with another layout."""
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name in own.keys() & {"exp_avg", "exp_avg_sq"}:  # AdamW's; other optimizers' state is left as it is
            if own[name].stride() != parameter.stride():
                own[name] = torch.empty_like(parameter).copy_(own[name])
