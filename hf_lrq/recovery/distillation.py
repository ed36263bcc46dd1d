"""The distance between a student and its teacher, in their logits and in their last hidden states.

Source: RILQ (Lee et al., 2024) adds a loss on model outputs to one on hidden states; QuIP# (Tseng et al., 2024, §5)
fine-tunes on the original's outputs alone.
"""

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.errors import RecoveryError
from hf_lrq.recovery.teacher import Targets, outputs_of

SMALLEST = 1e-6  # Probability of all tokens beyond the top k, about ten roundings of the sum that it is one minus.


def distances(student: nn.Module, batch: Batch, targets: Targets) -> tuple[Tensor, Tensor, int]:
    """Mean divergence (nats), relative squared error of the hidden states, and the number of positions.

    A part that the teacher has no target for is zero.

    Raises:
        RecoveryError: if student and teacher do not fit together.
    """
    logits, hidden = outputs_of(student, batch)
    first = hidden if logits is None else logits
    assert first is not None, "outputs_of raises where there is neither"
    targets = targets.to(first.device)
    zero = first.new_zeros((), dtype=torch.float32)
    divergence = relative_error = zero
    if logits is not None and targets.log_probs is not None and targets.tokens is not None:
        check_length(len(logits), len(targets.log_probs))
        if int(targets.tokens.max()) >= logits.shape[-1]:
            raise RecoveryError(f"The teacher has more tokens than the {logits.shape[-1]} of the student.")
        divergence = coarse_divergence(logits, targets.log_probs, targets.tokens)
    if hidden is not None and targets.hidden is not None:
        check_length(len(hidden), len(targets.hidden))
        if hidden.shape != targets.hidden.shape:
            raise RecoveryError(
                f"Hidden states of the teacher have width {targets.hidden.shape[-1]}, of the student "
                f"{hidden.shape[-1]}. The teacher is the model that was compressed."
            )
        wanted = targets.hidden.float()
        relative_error = (hidden.float() - wanted).square().sum() / wanted.square().sum().clamp(min=SMALLEST)
    return divergence, relative_error, len(first)


def check_length(ours: int, theirs: int) -> None:
    """Complain about outputs for different numbers of positions."""
    if ours != theirs:
        raise RecoveryError(f"The teacher has outputs for {theirs} positions, the student for {ours}.")


def coarse_divergence(logits: Tensor, log_probs: Tensor, tokens: Tensor) -> Tensor:
    """KL(teacher, student) in nats over k + 1 events: each of the teacher's top k tokens, and any other; the mean.

    At most the divergence over all tokens, and equal to it for k = all. Unlike a softmax over the top k alone it
    notices a student that moves probability to the rest.

    Args:
        logits: [n, vocabulary], the student's.
        log_probs, tokens: [n, k], the teacher's.

    >>> coarse_divergence(torch.zeros(1, 4), torch.tensor([[0.5]]).log(), torch.tensor([[2]])).round(decimals=4)
    tensor(0.1438)
    """
    log_q = logits.gather(-1, tokens).float() - logits.float().logsumexp(-1, keepdim=True)
    p = log_probs.exp()
    rest_p = (1 - p.sum(-1)).clamp(min=SMALLEST)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=SMALLEST)
    return ((p * (log_probs - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).mean()
