"""Measurements of a compressed model: perplexity, divergence from the original, distance of outputs, exact size."""

from hf_lrq.evaluation.files import compressed_layers, size_of_headers, stored_tensors
from hf_lrq.evaluation.likelihood import (
    Comparison,
    Estimate,
    Perplexity,
    WindowSums,
    compare,
    compare_windows,
    perplexity,
)
from hf_lrq.evaluation.outputs import OutputDistance, output_error
from hf_lrq.evaluation.sizes import Part, Size, size
from hf_lrq.evaluation.summary import Evaluation, evaluate, evaluate_outputs
from hf_lrq.evaluation.windows import is_causal, position_limit

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "OutputDistance",
    "Part",
    "Perplexity",
    "Size",
    "WindowSums",
    "compare",
    "compare_windows",
    "compressed_layers",
    "evaluate",
    "evaluate_outputs",
    "is_causal",
    "output_error",
    "perplexity",
    "position_limit",
    "size",
    "size_of_headers",
    "stored_tensors",
]
