"""Passes with gradients: how much the outputs of each layer move what the model says.

The second-order expansion of KL(model || model with errors) is that of the Fisher information, the second moment of the
gradients of -log p(y), y drawn from the model itself rather than from the text (YAQA, 2025). Models that say no
probabilities get random cotangents on their first output: the Gauss-Newton matrix of its squared error.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.calls import leaves
from hf_lrq.calibration.capture import Hooked, ModelRunner
from hf_lrq.calibration.masks import Masks
from hf_lrq.calibration.token_weights import TokenWeights, Weights
from hf_lrq.decomposition import OutputGram, OutputGramAccumulator, generator_for
from hf_lrq.errors import CalibrationError
from hf_lrq.work import Executor, Site
from hf_lrq.work.memory import give_back_freed, in_groups

# Of the Grams and gradients that are in memory at a time; what does not fit gets passes of its own.
BUDGET = 4 << 30
USUAL_TOKENS = 4096  # Of a batch that holds no integers, such as images.


@dataclass
class Sensitivity:
    """What the outputs of the layers mean for those of the model.

    Attributes:
        grams: name of the matrix -> Gram of the gradients at its outputs.
        weights: name of the matrix -> how much each token counts in the Gram of its inputs.
        shrinkage: name of the matrix -> how far these weights were made equal, 0 to 1.
        without: name of the matrix -> why it has none.
        passes: over each batch.
        positions: of the model's output that gradients came from, in one pass over all batches.
    """

    grams: dict[str, OutputGram] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    shrinkage: dict[str, float] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    positions: int = 0

    def weights_of(self, batch: int) -> dict[str, Sequence[Tensor]]:
        """Weights of the tokens of a batch, for each call of each matrix."""
        return {name: weights[batch] for name, weights in self.weights.items() if batch in weights}

    def summary(self) -> dict[str, Any]:
        """For a report: how many matrices, and what the estimators chose, in the mean."""
        if not self.grams:
            return {"two_sided": 0}
        count = len(self.grams)
        return {
            "two_sided": count,
            "output_shrinkage": sum(gram.shrinkage for gram in self.grams.values()) / count,
            "token_shrinkage": sum(self.shrinkage.values()) / count,
        }


def sensitivity(
    runner: ModelRunner, sites: Sequence[Site], workers: Executor, seed: int, one_by_one: bool = False
) -> Sensitivity:
    """What the outputs of linear sites mean: Grams of the gradients there, and the weights of tokens.

    Args:
        runner: of the original model.
        sites: of those that are routed, whose rows no hook sees apart, only the names are returned.
        workers: to spread the passes and sums over.
        seed: of the outputs that are drawn.
        one_by_one: whether passes must not overlap in time.

    Raises:
        CalibrationError: if gradients are not finite; names the matrix and the batch.
    """
    found = Sensitivity()
    for site in sites:
        if site.routed:
            found.without |= dict.fromkeys(site.matrices, "gradients of routed tokens are not seen at")
    linear = [site for site in sites if not site.routed]
    tokens = max(map(_tokens, runner.batches))

    def needed(site: Site) -> int:
        """Its Gram, and gradients of as many batches as there are workers."""
        return 8 * site.out_features**2 + 4 * site.out_features * tokens * workers.count

    for group in in_groups(linear, needed, BUDGET):
        _collect(runner, group, workers, seed, one_by_one, found)
        found.passes += 1
    return found


def _tokens(batch: Batch) -> int:
    """About how many rows the layers see of a batch."""
    tensors = [batch] if isinstance(batch, Tensor) else [value for value in batch.values() if isinstance(value, Tensor)]
    return max((value.numel() for value in tensors if not value.is_floating_point()), default=USUAL_TOKENS)


def _collect(
    runner: ModelRunner, sites: Sequence[Site], workers: Executor, seed: int, one_by_one: bool, found: Sensitivity
) -> None:
    sums = {site.name: OutputGramAccumulator(site.out_features) for site in sites}
    weights = {site.name: TokenWeights(site.in_features) for site in sites}
    with GradientRecorder(runner, sites, seed) as recorder:
        for start in range(0, len(runner), workers.count):
            window = range(start, min(start + workers.count, len(runner)))
            _add_window(window, recorder, sums, weights, workers, one_by_one)
            # Each pass leaves gaps between the little that is kept, which the next one cannot fill.
            give_back_freed()
        found.positions = sum(recorder.positions.values())
    for site in sites:
        gram = sums[site.name].finish()
        if gram is None:
            found.without[site.label] = "no gradient comes back to"
        else:
            found.grams[site.label] = replace(gram, energy=gram.energy / found.positions)
            found.weights[site.label] = weights[site.name].finish()
            found.shrinkage[site.label] = weights[site.name].shrinkage


def _add_window(
    window: Sequence[int],
    recorder: "GradientRecorder",
    sums: Mapping[str, OutputGramAccumulator],
    weights: Mapping[str, TokenWeights],
    workers: Executor,
    one_by_one: bool,
) -> None:
    """Add a few batches, all of whose inputs and gradients are in memory meanwhile."""
    watched = dict(zip(window, workers.map(recorder.watch, window, one_by_one), strict=True))

    def add(name: str) -> None:
        for index, calls in watched.items():
            for seen in calls.get(name, ()):
                weights[name].update(index, seen.x, seen.gradient.square().sum(-1))
                if not all(map(sums[name].update, seen.sequences())):
                    raise CalibrationError(
                        f"calibration batch {index} makes gradients at the outputs of {name} that hold NaN or "
                        "Inf. Calibrate in bfloat16 or float32, or set two_sided=False."
                    )

    workers.map(add, sums)


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a layer, and what came back to its output.

    Attributes:
        x: [..., in]; zero where a token is masked.
        gradient: [..., out] float32; zero there, too.
    """

    x: Tensor
    gradient: Tensor

    def sequences(self) -> Iterator[Tensor]:
        """Gradients [tokens, out] of each sequence, times the norm of their input."""
        weighted = self.gradient * self.x.float().norm(dim=-1, keepdim=True)
        # Without an axis of its own for the sequences, all rows count as one.
        yield from weighted.flatten(1, -2) if weighted.ndim > 2 else weighted.unsqueeze(0)


class GradientRecorder(Hooked):
    """Passes over single batches, forward and back, that note the gradients at the outputs of some sites.

    Passes may run in several threads. No gradient of a parameter is computed.

    Args:
        runner: makes the passes forward.
        sites: linear ones.
        seed: of the outputs that are drawn.

    Attributes:
        positions: batch -> rows of the model's output that are real.
    """

    def __init__(self, runner: ModelRunner, sites: Sequence[Site], seed: int):
        super().__init__()
        self._runner, self._names, self._seed = runner, [site.name for site in sites], seed
        self._local = threading.local()
        self.positions: dict[int, int] = {}

    def __enter__(self) -> "GradientRecorder":
        for name in self._names:
            module = self._runner.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def watch(self, index: int) -> dict[str, list[Seen]]:
        """Inputs and gradients of each site for one batch, by name, for each of its calls."""
        masks = self._runner.masks(index)
        seen = self._local.seen = []
        try:
            with torch.enable_grad():
                output = self._runner.run(index)
        finally:
            self._local.seen = None
        target, cotangent, kept = _drawn(output, masks, generator_for(self._seed, f"outputs/{index}"))
        self.positions[index] = int(target.shape[:-1].numel() if kept is None else kept.sum())
        if not seen or not target.requires_grad:
            return {}
        with self._runner.failures(index):
            gradients = torch.autograd.grad(target, [edge for *_, edge in seen], cotangent, allow_unused=True)
        found: dict[str, list[Seen]] = {}
        for (name, x, zeros, _), gradient in zip(seen, gradients, strict=True):
            # A call without a gradient counts for nothing, but it is one.
            gradient = zeros if gradient is None else gradient.float()
            kept = masks.kept(name, x.shape[:-1])
            if kept is not None:
                x, gradient = x * kept.unsqueeze(-1), gradient * kept.unsqueeze(-1)
            found.setdefault(name, []).append(Seen(x, gradient))
        return found

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            seen = getattr(self._local, "seen", None)
            if seen is None:
                return None
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if not y.requires_grad:
                # The first one on the way; a copy, since what begins a graph cannot be written to.
                y = y.detach().requires_grad_().clone()
            zeros = torch.zeros((), device=y.device).expand(y.shape)
            # Of the output as it is now: what comes next may write to it.
            seen.append((name, x.detach(), zeros, torch.autograd.graph.get_gradient_edge(y)))
            return y

        return note


def _drawn(output: Any, masks: Masks, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """An output of the model, the gradient there of -log p of labels drawn from it, or a random one, and what of it is
    real."""
    target, probable = said(output)
    if not probable:
        cotangent = torch.randn(target.shape, generator=generator).to(target)
    else:
        p = target.detach().float().softmax(-1)
        level = torch.rand(target.shape[:-1], generator=generator).to(p).unsqueeze(-1)
        label = (p.cumsum(-1) < level).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        cotangent = p.scatter_add(-1, label, torch.full_like(level, -1)).to(target)
    kept = masks.kept("decoder", target.shape[:-1])
    return target, cotangent if kept is None else cotangent * kept.unsqueeze(-1), kept


def said(output: Any) -> tuple[Tensor, bool]:
    """What a model says, [..., out]: its logits, or its first floating-point output; whether they are logits.

    Raises:
        CalibrationError: if there is no such output.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if isinstance(logits, Tensor) and logits.shape[-1] > 1:
        return logits, True
    for _, leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf, False
    raise CalibrationError(f"the model returns no floating-point tensor, got {type(output).__name__}.")
