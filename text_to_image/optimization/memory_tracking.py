"""Counts the bytes that a GPU would hold while code runs on tensors without data (device 'meta'): no GPU, no weights.

Tensors of the meta device have shapes, types and storages, and autograd keeps and frees them as it does on a GPU.
"""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes: PyTorch's CUDA allocator rounds every allocation up to a multiple of this


class MemoryTracker(TorchDispatchMode):
    """Adds up the storages that are alive: `live` bytes now, `history` after each allocation since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self._sizes: dict[int, int] = {}  # by the address of the storage

    def restart(self) -> None:
        self.history = [self.live]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = NORMS.get(func, func)(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += self._sizes[address]
        self.history.append(self.live)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.live -= self._sizes.pop(address)


def _group_norm(x, weight, bias, batch, *rest):
    channels, pixels, groups, eps = rest
    statistics = x.new_empty(batch, groups), x.new_empty(batch, groups)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *statistics


def _layer_norm(x, shape, *rest):
    statistics = x.new_empty(x.shape[: x.dim() - len(shape)], dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _group_norm_backward(grad, x, mean, rstd, weight, *rest):
    return _gradients(x, weight, weight, wanted=rest[-1])


def _layer_norm_backward(grad, x, shape, mean, rstd, *rest):
    weight, bias, wanted = rest
    return _gradients(x, weight, bias, wanted=wanted)


def _gradients(*tensors, wanted):
    return tuple(torch.empty_like(t) if want else None for t, want in zip(tensors, wanted, strict=True))


# What the CUDA kernels return. torch's own for the meta device, written in Python, take half of the time of a trace.
NORMS = {
    torch.ops.aten.native_group_norm.default: _group_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.native_group_norm_backward.default: _group_norm_backward,
    torch.ops.aten.native_layer_norm_backward.default: _layer_norm_backward,
}


class GpuKernels(TorchFunctionMode):
    """Lets the meta device keep what CUDA's kernels keep: fused attention, convolutions in channels_last.

    With `autocast` also what fp16 autocast keeps: products in half precision, norms in fp32, trained weights cast once
    in a forward pass (until `end_forward`), frozen ones at every use
    (https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior).
    """

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.autocast = autocast
        self._cast: dict[int, torch.Tensor] | None = {}

    def begin_forward(self) -> None:
        self._cast = {}

    def end_forward(self) -> None:
        """Autocast forgets its cast weights; what is recomputed in the backward pass casts them again."""
        self._cast = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast:
            args, kwargs = self._autocast(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is torch.conv2d:
            return func(*args, **kwargs).contiguous(memory_format=torch.channels_last)
        return func(*args, **kwargs)

    def _autocast(self, func, args, kwargs):
        if func in (F.linear, torch.conv2d, F.scaled_dot_product_attention):
            return tuple(map(self._half, args)), {name: self._half(value) for name, value in kwargs.items()}
        if func in (F.group_norm, F.layer_norm):
            return tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}
        return args, kwargs

    def _half(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if self._cast is None or not (value.is_leaf and value.requires_grad):
            return value.half()
        if id(value) not in self._cast:
            self._cast[id(value)] = value.half()
        return self._cast[id(value)]


def _float(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


def _fused_attention(query, key, value, attn_mask=None, **_):
    """What CUDA's kernels keep: query, key, value, result and logsumexp, never the (B, H, N, N) scores.

    Flash attention in half precision; the memory-efficient kind for fp32 and with masks.
    """
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]
