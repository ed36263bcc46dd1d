"""How far two predictions are apart."""

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from log-probabilities [..., vocabulary]: [...].

    Computed as sum_v [p ln(p/q) - p + q], each term of which is at least 0. For exact distributions that adds nothing;
    in float32 it cancels the rounding of both normalisers, which is larger than a small divergence.
    """
    p = log_p.exp()
    # Where p underflows the difference of logarithms may be infinite; the term's limit is q.
    surprise = torch.where(p > 0, p * (log_p - log_q), 0)
    return (surprise - p + log_q.exp()).sum(-1)
