"""How well a language model predicts a text, alone (perplexity) and against the model it was made from (divergence)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.divergence import kl_divergence
from hf_lrq.errors import EvaluationError
from hf_lrq.evaluation.windows import (
    Plan,
    Window,
    as_tokens,
    check_causal,
    evaluating,
    next_token_logits,
    plan_windows,
)

WindowProgress = Callable[[int, int], None]  # Gets (windows done, windows in all).
CHUNK = 1 << 21  # Logits turned to float32 at a time; allocators map larger temporaries anew, which takes longer.
TOP = 5


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        mean: sum over tokens / number of tokens.
        standard_error: estimated from windows, nearly independent unlike the tokens in one; None for one window.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def from_windows(cls, sums: Sequence[float], counts: Sequence[int]) -> "Estimate":
        """The ratio estimator over windows w with sums s_w and token counts n_w.

        mean m = sum(s) / sum(n); standard error = sqrt(W / (W - 1) * sum((s_w - m n_w)^2)) / sum(n).
        """
        total = sum(counts)
        mean = math.fsum(sums) / total
        if len(sums) < 2:
            return cls(mean, None)
        spread = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
        return cls(mean, math.sqrt(spread * len(sums) / (len(sums) - 1)) / total)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {"mean": self.mean, "standard_error": self.standard_error}


@dataclass(frozen=True)
class Perplexity:
    """Cross-entropy of a text under a model.

    Attributes:
        nats: -ln p(token | tokens before it in the window), mean over scored tokens.
        tokens: number of tokens scored: all but the first.
        window, stride: see `windows.strided_windows`.
    """

    nats: Estimate
    tokens: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite beyond exp(700)."""
        return math.exp(self.nats.mean) if self.nats.mean < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "perplexity": self.perplexity,
            "nats_per_token": self.nats.mean,
            "standard_error": self.nats.standard_error,
            "tokens": self.tokens,
            "window": self.window,
            "stride": self.stride,
        }


@dataclass(frozen=True)
class Comparison:
    """A compressed model q beside its original p, on the same windows of a text.

    Attributes:
        compressed, original: perplexity of each.
        nats_rise: ln perplexity(q) - ln perplexity(p); its standard error is paired, so smaller than that of either.
        kl: KL(p || q) = sum_v p(v) ln(p(v) / q(v)), nats per token.
        reverse_kl: KL(q || p).
        top1_agreement: fraction of positions at which both find the same token most likely.
        top5_agreement: mean fraction of p's five most likely tokens that are among q's five.
    """

    compressed: Perplexity
    original: Perplexity
    nats_rise: Estimate
    kl: Estimate
    reverse_kl: Estimate
    top1_agreement: Estimate
    top5_agreement: Estimate

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {name: getattr(self, name).to_dict() for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class WindowSums:
    """What `compare` adds up: sums over the scored tokens of each window, so that models can be compared pairwise.

    Attributes:
        plan: the windows.
        original, compressed: nats of the text.
        kl, reverse_kl, top1_agreement, top5_agreement: see `Comparison`.
    """

    plan: Plan
    original: list[float]
    compressed: list[float]
    kl: list[float]
    reverse_kl: list[float]
    top1_agreement: list[float]
    top5_agreement: list[float]

    def comparison(self) -> Comparison:
        """The means."""
        counts = self.plan.counts
        rise = [ours - theirs for ours, theirs in zip(self.compressed, self.original, strict=True)]
        means = ("kl", "reverse_kl", "top1_agreement", "top5_agreement")
        return Comparison(
            compressed=_perplexity(self.compressed, self.plan),
            original=_perplexity(self.original, self.plan),
            nats_rise=Estimate.from_windows(rise, counts),
            **{name: Estimate.from_windows(getattr(self, name), counts) for name in means},
        )


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    window: int | None = None,
    stride: int | None = None,
    progress: WindowProgress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on one text.

    Every token but the first is scored exactly once, see `windows.strided_windows`. Log-softmax in float32, sums over
    tokens in float64; one window's logits are in memory at a time.

    Args:
        model: called as `model(input_ids).logits`; its mode and the global random state are left as they are.
        tokens: [n] or [1, n] ids.
        window: tokens the model sees; None takes the model's limit, at most 2048.
        stride: tokens from one window to the next; None takes half the window.
        progress: called after each window.

    Raises:
        EvaluationError: if the text is too short, the window too long, or the model not a causal language model.
    """
    tokens = as_tokens(tokens)
    plan = plan_windows((model,), tokens, window, stride)
    check_causal(model, tokens)
    sums = []
    with evaluating(model):
        for done, part in enumerate(plan.windows, 1):
            logits = next_token_logits(model, tokens, part)
            targets = tokens[part.end - part.scored : part.end].to(logits.device)
            nats = [
                _negative_log_likelihood(torch.log_softmax(rows.float(), -1), wanted)
                for rows, wanted in zip(_chunks(logits), targets.split(_chunk_rows(logits)), strict=True)
            ]
            sums.append(_finite(_total(nats), part, model))
            if progress is not None:
                progress(done, len(plan.windows))
    return _perplexity(sums, plan)


def compare(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    window: int | None = None,
    stride: int | None = None,
    progress: WindowProgress | None = None,
) -> Comparison:
    """A compressed model against its original on one text, see `Comparison`.

    Both models run on each window in turn, so the logits of one window of each are in memory at a time.

    Args:
        model: the compressed model q.
        reference: the original p; its dtype and device may differ.
        tokens, window, stride, progress: as in `perplexity`.

    Raises:
        EvaluationError: where `perplexity` raises it, or if the vocabularies differ.
    """
    return compare_windows(model, reference, tokens, window, stride, progress).comparison()


def compare_windows(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    window: int | None = None,
    stride: int | None = None,
    progress: WindowProgress | None = None,
) -> WindowSums:
    """`compare`, window by window; arguments and errors are the same."""
    tokens = as_tokens(tokens)
    plan = plan_windows((model, reference), tokens, window, stride)
    for each in (model, reference):
        check_causal(each, tokens)
    rows: list[list[float]] = []
    with evaluating(model, reference):
        for done, part in enumerate(plan.windows, 1):
            q = next_token_logits(model, tokens, part)
            p = next_token_logits(reference, tokens, part)
            if p.shape != q.shape:
                raise EvaluationError(
                    f"The models have vocabularies of {q.shape[1]} (compressed) and {p.shape[1]} (original) tokens. "
                    "Compare with the model it was made from."
                )
            targets = tokens[part.end - part.scored : part.end].to(q.device)
            pieces = [
                _compare_rows(p_rows.to(q.device), q_rows, wanted)
                for p_rows, q_rows, wanted in zip(_chunks(p), _chunks(q), targets.split(_chunk_rows(q)), strict=True)
            ]
            sums = [_total(list(column)) for column in zip(*pieces, strict=True)]
            _finite(sums[0], part, reference)
            _finite(sums[1], part, model)
            rows.append(sums)
            if progress is not None:
                progress(done, len(plan.windows))
    return WindowSums(plan, *map(list, zip(*rows, strict=True)))


def _compare_rows(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """(nats of p, nats of q, KL, reverse KL, top-1 agreement, top-5 agreement) of each token, [rows] each."""
    log_p, log_q = torch.log_softmax(p_logits.float(), -1), torch.log_softmax(q_logits.float(), -1)
    k = min(TOP, log_p.shape[-1])
    p_best, q_best = log_p.topk(k).indices, log_q.topk(k).indices
    shared = (p_best.unsqueeze(-1) == q_best.unsqueeze(-2)).any(-1)
    return (
        _negative_log_likelihood(log_p, targets),
        _negative_log_likelihood(log_q, targets),
        kl_divergence(log_p, log_q),
        kl_divergence(log_q, log_p),
        (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        shared.float().mean(-1),
    )


def _negative_log_likelihood(log_p: Tensor, targets: Tensor) -> Tensor:
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _chunk_rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(_chunk_rows(logits))


def _total(pieces: list[Tensor]) -> float:
    return float(torch.cat(pieces).cpu().double().sum())


def _finite(nats: float, part: Window, model: nn.Module) -> float:
    if math.isnan(nats):
        raise EvaluationError(
            f"{type(model).__name__} returns NaN logits for tokens {part.start} to {part.end}. "
            "A dtype of more range (bfloat16 or float32) helps where float16 overflows."
        )
    return nats


def _perplexity(sums: list[float], plan: Plan) -> Perplexity:
    return Perplexity(Estimate.from_windows(sums, plan.counts), sum(plan.counts), plan.window, plan.stride)
