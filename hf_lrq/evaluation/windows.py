"""Which tokens of a text are scored in which window, and how a model is asked for their logits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.errors import EvaluationError

LARGEST_DEFAULT_WINDOW = 2048
_POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Window:
    """The model sees tokens[start:end]; the last `scored` of them are scored.

    Attributes:
        start, end: half-open range of token positions.
        scored: how many tokens at the end of the window count.
    """

    start: int
    end: int
    scored: int


def strided_windows(n_tokens: int, window: int, stride: int) -> list[Window]:
    """Overlapping windows in which every token but the first is scored exactly once.

    The first window scores all its tokens but one; each later window starts `stride` tokens further and scores what
    the window before did not reach, so with at least `window - stride` tokens of context. `stride = window - 1` is the
    non-overlapping evaluation of the literature up to one token per window; a smaller stride costs more time and gives
    every token more context.

    Args:
        n_tokens: length of the text, at least 2.
        window: tokens the model sees at a time, at least 2.
        stride: tokens from one window to the next, from 1 to window - 1.

    Raises:
        EvaluationError: if a number is out of its range.

    >>> [(w.start, w.end, w.scored) for w in strided_windows(10, window=6, stride=3)]
    [(0, 6, 5), (3, 9, 3), (6, 10, 1)]
    """
    if n_tokens < 2:
        raise EvaluationError(f"The text has {n_tokens} tokens; scoring needs at least 2. Give a longer text.")
    if window < 2:
        raise EvaluationError(f"window must be at least 2 tokens, got {window}.")
    if not 1 <= stride < window:
        raise EvaluationError(
            f"stride must be between 1 and window - 1 = {window - 1}, got {stride}: "
            "the first token of a window has no context and cannot be scored in it."
        )
    end = min(window, n_tokens)
    found = [Window(0, end, end - 1)]
    while end < n_tokens:
        start, reached = found[-1].start + stride, end
        end = min(start + window, n_tokens)
        found.append(Window(start, end, end - reached))
    return found


@dataclass(frozen=True)
class Plan:
    """The windows of one evaluation, and the numbers they were made with.

    Attributes:
        windows: in the order of the text.
        window, stride: the numbers that were used, in tokens.
    """

    windows: list[Window]
    window: int
    stride: int

    @property
    def counts(self) -> list[int]:
        """Number of scored tokens in each window."""
        return [part.scored for part in self.windows]


def plan_windows(models: Sequence[nn.Module], tokens: Tensor, window: int | None, stride: int | None) -> Plan:
    """`strided_windows` for these models: defaults filled in, the text and the models' limits checked.

    Args:
        models: the models that will see these windows.
        tokens: [n] ids, see `as_tokens`.
        window: tokens in a window; None takes the smallest limit of positions, at most 2048.
        stride: tokens from one window to the next; None takes half the window.

    Raises:
        EvaluationError: if a model cannot see so many tokens or has no such token.
    """
    known = [(type(model).__name__, position_limit(getattr(model, "config", None))) for model in models]
    limits = [(name, limit) for name, limit in known if limit is not None]
    if window is None:
        window = min([LARGEST_DEFAULT_WINDOW, *(limit for _, limit in limits)])
    for name, limit in limits:
        if window > limit:
            raise EvaluationError(f"window is {window} tokens, but {name} has positions for {limit} only.")
    for model in models:
        vocabulary = _vocabulary(model)
        if vocabulary is not None and len(tokens) and int(tokens.max()) >= vocabulary:
            raise EvaluationError(
                f"The text holds token id {int(tokens.max())}, but {type(model).__name__} has {vocabulary} embeddings. "
                "Use the tokenizer that belongs to the model."
            )
    stride = max(window // 2, 1) if stride is None else stride
    return Plan(strided_windows(len(tokens), window, stride), window, stride)


def as_tokens(tokens: Tensor) -> Tensor:
    """One sequence of ids, [n] int64 on the CPU, from [n] or [1, n].

    Raises:
        EvaluationError: if it is not one sequence of integers.
    """
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise EvaluationError(
            f"tokens must be one sequence of ids, [n] or [1, n] integers, got {tokens.dtype} {tuple(tokens.shape)}."
        )
    return tokens.detach().cpu().long()


def position_limit(config: Any) -> int | None:
    """Most tokens a transformers-like config has positions for (of the text part), or None where it does not say."""
    limits = [limit for part in text_configs(config) if (limit := _limit_of(part, _POSITION_LIMITS)) is not None]
    return min(limits, default=None)


def text_configs(config: Any) -> list[Any]:
    """The text parts of a transformers-like config: as a rule one, which may be the config itself."""
    of_text = getattr(config, "get_text_config", None)
    if not callable(of_text):
        return [config]
    try:
        return [of_text()]
    except ValueError:  # There is one to read with and one to write with.
        return [of_text(encoder=True), of_text(decoder=True)]


def _limit_of(config: Any, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 1), None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its ids: the device of its first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, without gradients; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        # Not inference_mode: tensors that modules cache in here must be usable in training later.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def next_token_logits(model: nn.Module, tokens: Tensor, window: Window) -> Tensor:
    """Logits for the scored tokens of one window, [scored, vocabulary], on the model's device and in its dtype."""
    ids = tokens[window.start : window.end].unsqueeze(0).to(device_of(model))
    logits: Tensor = model(ids).logits[0]
    return logits[-window.scored - 1 : -1]


def check_causal(model: nn.Module, tokens: Tensor) -> None:
    """Make sure that `model(ids).logits` predicts the next token from the tokens before it.

    The last id of a short prefix is replaced: logits at earlier positions must not change.

    Raises:
        EvaluationError: if the model has no such logits, or looks ahead.
    """
    name = type(model).__name__
    instead = "Compare it with the original by hf_lrq.evaluation.output_error."
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise EvaluationError(f"{name} is an encoder-decoder and has no perplexity of plain text. {instead}")
    prefix = tokens[:_PROBE_TOKENS].unsqueeze(0).to(device_of(model))
    changed = prefix.clone()
    changed[0, -1] = prefix[0, 0] if prefix[0, 0] != prefix[0, -1] else (0 if prefix[0, -1] else 1)
    with evaluating(model):
        logits = getattr(model(prefix), "logits", None)
        if logits is None or logits.ndim != 3 or logits.shape[1] != prefix.shape[1]:
            seen = "returns no logits" if logits is None else f"returns logits of shape {tuple(logits.shape)}"
            raise EvaluationError(f"{name} {seen}, not one row per token, so it has no perplexity. {instead}")
        # Kernels may sum in another order when a token is routed to another expert.
        tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
        logits, others = logits[0, :-1].float(), model(changed).logits[0, :-1].float()
    if (logits - others).norm() > tolerance * logits.norm():
        raise EvaluationError(f"{name} sees the tokens it would have to predict, so it has no perplexity. {instead}")


def is_causal(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the model has a perplexity, see `check_causal`."""
    try:
        check_causal(model, as_tokens(tokens))
    except EvaluationError:
        return False
    return True


def _vocabulary(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    table = get() if callable(get) else None
    count = getattr(table, "num_embeddings", None)
    return count if isinstance(count, int) else None
