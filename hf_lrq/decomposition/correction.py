"""Weights that make up for the errors of the blocks before (QEP, Arai and Ichikawa, 2025; GPTAQ, 2025).

A layer of a compressed model sees x, the same layer of the original z. The weight W' whose output W' x is nearest to
W z is W E[z x^T] E[x x^T]^-1. To follow it all the way fits the calibration data too closely; QEP goes a share of it.
"""

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import InputGram

RIDGE = 0.01  # Of the mean diagonal of E[x x^T].


def corrected(W: Tensor, gram: InputGram, share: float) -> Tensor:
    """W + share (W' - W), [out, in] float32; W itself where x and z are the same.

    Args:
        W: [out, in] float32.
        gram: with E[z x^T] as its `cross`.
        share: 0 to 1.
    """
    if share == 0 or gram.cross is None:
        return W
    H, cross = gram.H.to(W.device, torch.float64), gram.cross.to(W.device, torch.float64)
    ridge = RIDGE * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    change = torch.linalg.solve(H + ridge, (cross - H).T).T
    return W + share * (W @ change.to(W.dtype))
