"""All measurements of one compressed model in one call."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_lrq.evaluation.likelihood import Comparison, Perplexity, WindowProgress, compare, perplexity
from hf_lrq.evaluation.outputs import Batch, OutputDistance, output_error
from hf_lrq.evaluation.sizes import Size, size


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured; None where it was not.

    Attributes:
        size: where the bytes are.
        perplexity: perplexity of the compressed model.
        comparison: comparison with the original, on the same text.
        outputs: distance from the outputs of the original, for models without a perplexity.
        text: what the text was, in words.
        seconds: how long the measurements took.
    """

    size: Size
    perplexity: Perplexity | None = None
    comparison: Comparison | None = None
    outputs: OutputDistance | None = None
    text: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: part.to_dict() if hasattr(part, "to_dict") else part for name, part in parts.items()}


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    reference: nn.Module | None = None,
    window: int | None = None,
    stride: int | None = None,
    text: str | None = None,
    progress: WindowProgress | None = None,
) -> Evaluation:
    """Perplexity and size of a causal language model, and its divergence from the original where there is one.

    Args:
        model: compressed or not.
        tokens: [n] or [1, n] ids of one text.
        reference: the original.
        window, stride, progress: as in `perplexity`.
        text: what the text is, for the record.

    Raises:
        EvaluationError: see `perplexity` and `compare`.
    """
    start = time.monotonic()
    comparison = None
    if reference is None:
        own = perplexity(model, tokens, window, stride, progress)
    else:
        comparison = compare(model, reference, tokens, window, stride, progress)
        own = comparison.compressed
    seconds = time.monotonic() - start
    return Evaluation(size=size(model), perplexity=own, comparison=comparison, text=text, seconds=seconds)


def evaluate_outputs(
    model: nn.Module, reference: nn.Module, batches: Iterable[Batch], text: str | None = None
) -> Evaluation:
    """Output error and size of any model; arguments as in `output_error`."""
    start = time.monotonic()
    outputs = output_error(model, reference, batches)
    return Evaluation(size=size(model), outputs=outputs, text=text, seconds=time.monotonic() - start)
