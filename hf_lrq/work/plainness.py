"""Whether a module computes what nn.Linear or nn.Embedding computes, judged by what it does."""

import copy
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lrq.nn import LRQEmbedding
from hf_lrq.nn.embedding import Lookup

_PROBE = (5, 7)  # [out, in] of the small weight that is put in.
FACTOR = "embed_scale"  # Where embeddings that are scaled keep the factor; a buffer, or a number.


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer whose outputs are x W^T + b whatever x is, and no more than that.

    Subclasses of nn.Linear are tried out with small weights of their own, also where the module's are on the meta
    device. Those of torch are not taken: it reads their weights elsewhere (nn.MultiheadAttention) or replaces them.
    """
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or type(module).__module__.startswith("torch."):
        return False
    weight = module._parameters.get("weight")
    shape = (module.out_features, module.in_features)
    if weight is None or tuple(weight.shape) != shape or not weight.is_floating_point():
        return False
    state = {name for name, one in (*module._parameters.items(), *module._buffers.items()) if one is not None}
    if not state <= {"weight", "bias"} or any(child is not None for child in module._modules.values()):
        return False
    return _computes_linear(module)


def lookup_of(module: nn.Module) -> Lookup | None:
    """What an embedding does to the rows of its table; None for any other module, and one that does more than that.

    Subclasses of nn.Embedding are tried out with small tables of their own, as `is_plain_linear` does.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or isinstance(module, LRQEmbedding):
        return None
    if type(module) is nn.Embedding:
        return Lookup()
    weight = module._parameters.get("weight")
    state = {name for name, one in (*module._parameters.items(), *module._buffers.items()) if one is not None}
    if weight is None or not state <= {"weight", FACTOR} or module._modules:
        return None
    return next((lookup for lookup in _lookups(module) if _computes_lookup(module, lookup)), None)


def _lookups(module: nn.Module) -> Iterator[Lookup]:
    yield Lookup()
    factor = _factor_of(module)
    if factor is not None:
        yield Lookup(factor, rounded=False)
        yield Lookup(factor, rounded=True)


def _factor_of(module: nn.Module) -> float | None:
    # The value of a buffer is nowhere while a model is loaded; those who have one keep the number as well.
    factor = getattr(module, f"scalar_{FACTOR}", getattr(module, FACTOR, None))
    return float(factor) if isinstance(factor, int | float) else None


def _computes_lookup(module: nn.Embedding, lookup: Lookup) -> bool:
    probe: Any = bare(module)
    probe.num_embeddings, probe.embedding_dim = _PROBE
    rows = probe.num_embeddings
    probe.padding_idx = None if module.padding_idx is None else module.padding_idx % rows
    if FACTOR in probe._buffers:
        probe._buffers[FACTOR] = torch.tensor(_factor_of(module), device="cpu")
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(_PROBE, generator=generator, device="cpu")
    ids = torch.randint(rows, (4, 3), generator=generator, device="cpu")
    try:
        with torch.no_grad():
            return all(
                _looks_up(probe.train(training), W.to(dtype), at, lookup)
                for training in (False, True)
                for dtype in (torch.float32, torch.bfloat16)
                for at in (ids, ids[0])
            )
    # Whatever its code raises, it is no lookup.
    except Exception:
        return False


def _looks_up(probe: Any, W: Tensor, ids: Tensor, lookup: Lookup) -> bool:
    probe._parameters = {"weight": nn.Parameter(W)}
    rows, expected = probe(ids), lookup.of(F.embedding(ids, W))
    return isinstance(rows, Tensor) and rows.dtype == expected.dtype and torch.equal(rows, expected)


def bare(module: nn.Module) -> nn.Module:
    """A copy of a module with all its attributes, but without parameters and hooks."""
    clone = object.__new__(type(module))
    clone.__dict__ = {
        key: copy.copy(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()
    }
    clone.__dict__.pop("_hf_hook", None)
    clone.__dict__.pop("_old_forward", None)
    clone.__dict__.pop("forward", None)
    clone._parameters = dict.fromkeys(module._parameters)
    return clone


def _computes_linear(module: nn.Linear) -> bool:
    probe: Any = bare(module)
    rows, columns = _PROBE
    probe.in_features, probe.out_features = columns, rows
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, columns), (rows,), (4, 3, columns)
    W, b, x = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    scales = torch.tensor([0.0, 1e-3, 1.0, 1e3], device="cpu")[
        :, None, None
    ]  # What clips or rounds shows at one of them.
    bias = module._parameters.get("bias") is not None
    try:
        with torch.no_grad():
            return all(
                _agrees(probe.train(training), W.to(dtype), b.to(dtype) if bias else None, y.to(dtype))
                for training in (False, True)
                for dtype in (torch.float64, torch.bfloat16)
                for y in (x * scales, x[0])
            )
    # Whatever its code raises, it is no call of a linear layer.
    except Exception:
        return False


def _agrees(probe: Any, W: Tensor, b: Tensor | None, x: Tensor) -> bool:
    probe._parameters = {"weight": nn.Parameter(W), "bias": None if b is None else nn.Parameter(b)}
    y, expected = probe(x), F.linear(x, W, b)
    if not isinstance(y, Tensor) or y.dtype != expected.dtype or y.shape != expected.shape:
        return False
    tolerance = 1e-12 if x.dtype == torch.float64 else 0.02
    return bool(((y - expected).norm(dim=-1) <= tolerance * (1 + expected.norm(dim=-1))).all())
