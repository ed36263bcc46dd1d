"""How far the outputs of a compressed model are from those of its original: for models without a perplexity."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.errors import EvaluationError
from hf_lrq.evaluation.windows import device_of, evaluating

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class OutputDistance:
    """Distance of the outputs of two models on the same batches.

    Attributes:
        relative_error: ||Y - Y_0||_F / ||Y_0||_F over all positions, Y_0 from the original.
        cosine: mean cosine similarity of the outputs, position by position.
        positions: number of positions compared, without padding.
        output: which output was compared, "logits" or "last_hidden_state".
    """

    relative_error: float
    cosine: float
    positions: int
    output: str

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def output_error(model: nn.Module, reference: nn.Module, batches: Iterable[Batch]) -> OutputDistance:
    """Compare the logits, or else the last hidden states, of a compressed model and its original.

    Args:
        model: the compressed model.
        reference: the original; its dtype and device may differ.
        batches: tensors of ids [batch, n], or keyword arguments of one call each. An `attention_mask` of the shape of
            the outputs' leading axes excludes padding.

    Raises:
        EvaluationError: if there is no batch, or the outputs have no common name or shape.
    """
    squared_error = squared_norm = cosine = 0.0
    positions = 0
    name = ""
    with evaluating(model, reference):
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            name, ours = _output(model, inputs)
            theirs = getattr(reference(**_moved(inputs, reference)), name, None)
            if theirs is None or theirs.shape != ours.shape:
                seen = "none" if theirs is None else tuple(theirs.shape)
                raise EvaluationError(
                    f"{type(model).__name__} returns {name} of shape {tuple(ours.shape)}, the original {seen}. "
                    "Compare with the model it was made from."
                )
            ours, theirs = _rows(ours, inputs), _rows(theirs.to(ours.device), inputs)
            squared_error += float((ours - theirs).square().sum())
            squared_norm += float(theirs.square().sum())
            cosine += float(torch.cosine_similarity(ours, theirs, dim=-1).sum())
            positions += len(ours)
    if not positions:
        raise EvaluationError("There is nothing to compare the outputs on. Give at least one batch of token ids.")
    if math.isnan(squared_error):
        raise EvaluationError(f"{type(model).__name__} or its original returns NaN. Try bfloat16 or float32.")
    relative = math.sqrt(squared_error / squared_norm) if squared_norm else math.inf if squared_error else 0.0
    return OutputDistance(relative, cosine / positions, positions, name)


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[str, Tensor]:
    returned = model(**_moved(inputs, model))
    for name in ("logits", "last_hidden_state"):
        value = getattr(returned, name, None)
        if isinstance(value, Tensor):
            return name, value
    raise EvaluationError(f"{type(model).__name__} returns neither logits nor last_hidden_state; nothing to compare.")


def _moved(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = device_of(model)
    return {name: value.to(device) for name, value in inputs.items()}


def _rows(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The rows of an output that are not padding, [positions, width] float32."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == output.shape[:-1]:
        return output[mask.bool().to(output.device)].float()
    return output.flatten(0, -2).float()
