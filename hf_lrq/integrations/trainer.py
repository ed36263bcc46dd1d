"""The Riemannian optimizers inside transformers' Trainer, handed over or by name.

    trainer = Trainer(model=model, args=args, ..., optimizer_cls_and_kwargs=hf_lrq.trainer_optimizer(args))

or, where only TrainingArguments can be set (command lines, YAML files):

    hf_lrq.register_optimizers()
    args = TrainingArguments(..., optim="riemannian_adamw", optim_args="precond=two_sided,damping=1e-4")

In each step the Trainer first clips the raw gradients to `max_grad_norm` (1.0 by default), then the optimizer
preconditions them. `clip_projected` clips after whitening instead, in a norm that does not depend on how L R is split;
it takes `max_grad_norm=0`.

DDP and FSDP2 train as one process would. (accelerate starts FSDP on accelerators alone: on CPUs, asked for FSDP, it
trains with DDP and does not say so.)
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import transformers
from torch import nn

from hf_lrq.errors import LRQError, SpecError, did_you_mean
from hf_lrq.integrations.enumerations import extended
from hf_lrq.optim import RiemannianAdamW, RiemannianSGD, riemannian_param_groups
from hf_lrq.optim.input_metric import GRAM_DAMPING

OPTIMIZERS: dict[str, Any] = {"riemannian_adamw": RiemannianAdamW, "riemannian_sgd": RiemannianSGD}
GROUP_OPTIONS: dict[str, Any] = {
    "weight_decay": float,
    "factor_weight_decay": float,
    "grams": Mapping,
    "gram_damping": float,
}
# What people ask for under these names -> why it is none of them.
REFUSED = {
    "lora_pro": "LoRA-Pro (2024) runs Adam on a gradient as large as the full weight, with two moments of that size, "
    "and what is compressed has no room for them. Without them it is the gradient times the inverse Grams of the "
    "factors, as riemannian_sgd takes it, but for what lies in the spans of both, which counts once and not twice."
}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class RiemannianFactory:
    """What the Trainer calls with the model it is going to train."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: str = "riemannian_adamw",
        weight_decay: float = 0.0,
        factor_weight_decay: float = 0.0,
        grams: Mapping[str, Any] | None = None,
        gram_damping: float = GRAM_DAMPING,
        **options: Any,
    ) -> RiemannianAdamW | RiemannianSGD:
        """The optimizer over all trainable parameters of `model`.

        Args:
            model: with pairs of factors, see `hf_lrq.optim.factor_pairs`.
            optimizer: a key of `OPTIMIZERS`.
            weight_decay, factor_weight_decay, grams, gram_damping: see `hf_lrq.riemannian_param_groups`.
            options: of the optimizer.

        Raises:
            ValueError: if the model has no such pair, or an option is out of range.
        """
        groups = riemannian_param_groups(
            model,
            weight_decay=weight_decay,
            factor_weight_decay=factor_weight_decay,
            grams=grams,
            gram_damping=gram_damping,
        )
        built: RiemannianAdamW | RiemannianSGD = OPTIMIZERS[optimizer](groups, **options)
        return built


def trainer_optimizer(
    args: Any, optimizer: str = "riemannian_adamw", **options: Any
) -> tuple[type[RiemannianFactory], dict[str, Any]]:
    """`optimizer_cls_and_kwargs` of a Trainer: learning rate, betas, epsilon and weight decay are those of `args`.

    Args:
        args: the TrainingArguments that the Trainer gets.
        optimizer: "riemannian_adamw" or "riemannian_sgd".
        options: of the optimizer (`precond`, `damping`, `lr_ratio`, ...), and `factor_weight_decay`, `grams` and
            `gram_damping`, see `riemannian_param_groups`. They override `args`.

    Raises:
        SpecError: on an unknown optimizer or option; if `clip_projected` and `max_grad_norm` would both clip; under
            DeepSpeed and FSDP1, which flatten parameters, so that no pair is left to precondition.
    """
    if (reason := REFUSED.get(str(optimizer).lower().replace("-", "_").replace("lorapro", "lora_pro"))) is not None:
        raise SpecError(f"There is no optimizer {optimizer!r}: {reason}")
    if optimizer not in OPTIMIZERS:
        hint = did_you_mean(str(optimizer), OPTIMIZERS)
        raise SpecError(f"Unknown optimizer {optimizer!r}. Known: {', '.join(OPTIMIZERS)}.{hint}")
    known = option_types(optimizer)
    for name in options:
        if name not in known:
            raise SpecError(
                f"{optimizer} has no option {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}."
            )
    if options.get("clip_projected") is not None and args.max_grad_norm:
        raise SpecError(
            f"clip_projected={options['clip_projected']} clips whitened gradients, after max_grad_norm="
            f"{args.max_grad_norm} has clipped the raw ones. Set max_grad_norm=0, or leave clip_projected out."
        )
    if getattr(args, "deepspeed", None) or args.distributed_state.distributed_type == "DEEPSPEED":
        raise SpecError(
            f"{optimizer} pairs parameters, and DeepSpeed hands it flattened ones. Call "
            "hf_lrq.optim.precondition_gradients(model) and use any other optimizer, or train with DDP or FSDP2."
        )
    if getattr(args, "fsdp", None) and _fsdp_version(args) == 1:
        raise SpecError(
            f"{optimizer} pairs parameters, and FSDP1 hands it flattened ones. Set fsdp_config={{'version': 2}}; FSDP2 "
            "keeps them whole."
        )
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    usual = {name: value for name, value in given.items() if name in known}
    return RiemannianFactory, {"optimizer": optimizer, **usual, **options}


def _fsdp_version(args: Any) -> int:
    """Which FSDP the arguments ask for; earlier releases of transformers take the first if nothing is said."""
    planned = getattr(args, "fsdp_plugin_args", None) or {}
    config = args.fsdp_config if isinstance(args.fsdp_config, Mapping) else {}
    version: Any = planned.get("fsdp_version", config.get("version", 1))
    return int(version)


def register_optimizers() -> None:
    """Make `TrainingArguments(optim="riemannian_adamw")` and `"riemannian_sgd"` work in the Trainer. Idempotent.

    Options go into `optim_args`, as in "precond=two_sided,damping=1e-4". transformers has no public way in: this adds
    members to its enumeration of names and to its table of handlers, and looks whether it worked. Arguments that were
    saved with such a name can be loaded after this call only.

    Raises:
        LRQError: if this release of transformers keeps them elsewhere.
    """
    try:
        names = import_module("transformers.training_args").OptimizerNames
        handlers = import_module("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
        used = import_module("transformers.trainer")._OPTIMIZER_HANDLERS
        for name in OPTIMIZERS:
            handlers[extended(names, name.upper(), name)] = handler_of(name)
        reached = all(names(name).value == name and used.get(names(name)) is not None for name in OPTIMIZERS)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise LRQError(_elsewhere(f"{type(error).__name__}: {error}")) from error
    if not reached:
        raise LRQError(_elsewhere("the Trainer does not look where the names were added"))


def _elsewhere(seen: str) -> str:
    return (
        f"transformers {transformers.__version__} has no place for further optimizers that is known here ({seen}). "
        "Use Trainer(optimizer_cls_and_kwargs=hf_lrq.trainer_optimizer(args)) instead."
    )


def handler_of(optimizer: str) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """What transformers calls with its OptimizerContext to learn how an optimizer is made."""

    def handle(context: Any) -> tuple[Any, dict[str, Any]]:
        return trainer_optimizer(context.args, optimizer, **parsed_options(optimizer, context.optim_args))

    return handle


def option_types(optimizer: str) -> dict[str, Any]:
    """Option -> type, of an optimizer and of the groups made for it."""
    parameters = inspect.signature(OPTIMIZERS[optimizer]).parameters
    return {name: p.annotation for name, p in parameters.items() if name != "params"} | GROUP_OPTIONS


def parsed_options(optimizer: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of `optim_args`; names that are unknown are left as they are.

    Raises:
        SpecError: on a text that is no value of its option.
    """
    return {name: _parsed(name, text, option_types(optimizer).get(name, str)) for name, text in texts.items()}


def _parsed(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is int:
            return int(text)
        if kind == float | None and text.lower() == "none":
            return None
        return text if kind is str else float(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", float | None: "a number or none"}
        known = wanted.get(kind, "set in code, not as text")
        raise SpecError(f"optim_args: {name}={text!r}, but {name} is {known}.") from None
