"""Language models in a few bits per weight, W = Q + L R, inside transformers and PEFT.

Importing this package makes checkpoints with `quant_method: "hf_lrq"` loadable by transformers. The names below are
imported when they are first used, so that neither the command line's help nor a process that only loads a checkpoint
pays for what it does not need.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lrq.integrations import register

if TYPE_CHECKING:
    from hf_lrq.decomposition.compress_matrix import compress_matrix
    from hf_lrq.decomposition.gram import InputGram, proxy_loss
    from hf_lrq.errors import (
        BackendError,
        CalibrationError,
        CheckpointError,
        CompressionError,
        EvaluationError,
        LRQError,
        RecoveryError,
        SpecError,
    )
    from hf_lrq.evaluation import evaluate
    from hf_lrq.integrations.compression import compress
    from hf_lrq.integrations.gates import GateThreshold
    from hf_lrq.integrations.peft import LRQAdapterConfig, export_lora
    from hf_lrq.integrations.planning import plan_for
    from hf_lrq.integrations.saving import save
    from hf_lrq.integrations.trainer import register_optimizers, trainer_optimizer
    from hf_lrq.integrations.transformers import LRQConfig, LRQHfQuantizer
    from hf_lrq.nn import fuse_layers, refit_factors, unfuse_layers
    from hf_lrq.nn.linear import LRQLinear
    from hf_lrq.optim import RiemannianAdamW, RiemannianSGD, precondition, riemannian_param_groups
    from hf_lrq.recovery import RecoveryOptions, recover
    from hf_lrq.spec import CompressionSpec, LayerSpec

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "CompressionError",
    "CompressionSpec",
    "EvaluationError",
    "GateThreshold",
    "InputGram",
    "LRQAdapterConfig",
    "LRQConfig",
    "LRQError",
    "LRQHfQuantizer",
    "LRQLinear",
    "LayerSpec",
    "RecoveryError",
    "RecoveryOptions",
    "RiemannianAdamW",
    "RiemannianSGD",
    "SpecError",
    "__version__",
    "compress",
    "compress_matrix",
    "evaluate",
    "export_lora",
    "fuse_layers",
    "plan_for",
    "precondition",
    "proxy_loss",
    "recover",
    "refit_factors",
    "register_optimizers",
    "riemannian_param_groups",
    "save",
    "trainer_optimizer",
    "unfuse_layers",
]

_HOME = {
    "BackendError": "hf_lrq.errors",
    "CalibrationError": "hf_lrq.errors",
    "CheckpointError": "hf_lrq.errors",
    "CompressionError": "hf_lrq.errors",
    "CompressionSpec": "hf_lrq.spec",
    "EvaluationError": "hf_lrq.errors",
    "GateThreshold": "hf_lrq.integrations.gates",
    "InputGram": "hf_lrq.decomposition.gram",
    "LRQAdapterConfig": "hf_lrq.integrations.peft",
    "LRQConfig": "hf_lrq.integrations.transformers",
    "LRQError": "hf_lrq.errors",
    "LRQHfQuantizer": "hf_lrq.integrations.transformers",
    "LRQLinear": "hf_lrq.nn.linear",
    "LayerSpec": "hf_lrq.spec",
    "RecoveryError": "hf_lrq.errors",
    "RecoveryOptions": "hf_lrq.recovery",
    "RiemannianAdamW": "hf_lrq.optim",
    "RiemannianSGD": "hf_lrq.optim",
    "SpecError": "hf_lrq.errors",
    "compress": "hf_lrq.integrations.compression",
    "compress_matrix": "hf_lrq.decomposition.compress_matrix",
    "evaluate": "hf_lrq.evaluation",
    "export_lora": "hf_lrq.integrations.peft",
    "fuse_layers": "hf_lrq.nn",
    "plan_for": "hf_lrq.integrations.planning",
    "precondition": "hf_lrq.optim",
    "proxy_loss": "hf_lrq.decomposition.gram",
    "recover": "hf_lrq.recovery",
    "refit_factors": "hf_lrq.nn",
    "register_optimizers": "hf_lrq.integrations.trainer",
    "riemannian_param_groups": "hf_lrq.optim",
    "save": "hf_lrq.integrations.saving",
    "trainer_optimizer": "hf_lrq.integrations.trainer",
    "unfuse_layers": "hf_lrq.nn",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        # `name` and `obj` let the interpreter add its own "Did you mean".
        raise AttributeError(f"module 'hf_lrq' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    home = _HOME[name]
    if home.startswith("hf_lrq.integrations."):
        # First, as it needs the others whole: the first of them to import transformers would be met half-way.
        import_module("hf_lrq.integrations.transformers")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


register()
