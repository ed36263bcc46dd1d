"""Which positions of a batch are real, and which inputs of a module those are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """Which positions of a batch are real, as bool [batch, length]; no mask where all are.

    Attributes:
        outside: for modules outside the decoder of an encoder-decoder model, so for all modules of other models.
        decoder: for those inside it. The first is for its own positions, the second for the inputs of its cross
            attention, where those can be told apart by their length.
    """

    outside: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], encoder_decoder: bool) -> "Masks":
        """From the keyword arguments of a model."""
        mask = _mask(arguments, "attention_mask")
        outside = () if mask is None else (mask,)
        if not encoder_decoder:
            return cls(outside, outside)
        own = _mask(arguments, "decoder_attention_mask")
        names = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels")
        shapes = {tuple(arguments[name].shape[:2]) for name in names if isinstance(arguments.get(name), Tensor)}
        cross = tuple(mask for mask in outside if tuple(mask.shape) not in shapes)
        return cls(outside, cross if own is None else (own, *cross))

    def rows(self, name: str, x: Tensor) -> Tensor:
        """Inputs x [..., in] of the module `name` without masked positions, [tokens, in].

        Only inputs whose leading axes are those of a mask, or its positions in a row, are masked.
        """
        rows = x.reshape(-1, x.shape[-1])
        kept = self.kept(name, x.shape[:-1])
        return rows if kept is None else rows[kept.flatten()]

    def kept(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Which rows of inputs [*shape, in] of the module `name` are real, bool [*shape]; None where all are."""
        for mask in self.decoder if "decoder" in name.split(".") else self.outside:
            # Mixtures of experts flatten [batch, length] to [tokens].
            if tuple(shape) in (tuple(mask.shape), (mask.numel(),)):
                return mask.reshape(shape)
        return None

    def real(self, name: str, positions: int, device: torch.device) -> Tensor:
        """Indices of the rows that `rows` keeps of inputs [positions, in]."""
        return self.rows(name, torch.arange(positions, device=device).unsqueeze(-1)).flatten()


def _mask(arguments: Mapping[str, Any], name: str) -> Tensor | None:
    mask = arguments.get(name)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.bool().all():
        return None
    return mask.bool()
