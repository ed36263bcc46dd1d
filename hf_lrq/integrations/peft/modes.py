"""What an adapter trains in a compressed layer, and the low-rank product that comes of it: tensors in, tensors out.

All but `Append` work in the basis of the layer's own factors and make of them, (L, R), another pair: the layer then
computes Q + L' R'. Every one starts at L' R' = L R, and exactly so: what is trained is added to L and R, or multiplied
with zero, before anything is rounded.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.factors import concatenated
from hf_lrq.matrices import Pair

SMALLEST_SINGULAR_VALUE = 1e-6  # Of the largest: directions below it are noise of float32, and are not turned.

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mode(ABC):
    """One way to adapt L R.

    Attributes:
        number: ranks that take part; None where the mode has no such choice, or for all of them.
    """

    number: int | None = None

    # The pair stands beside the rotations of the layer, not between them; it is added, and replaces nothing.
    outside: ClassVar[bool] = False
    # Each pass of training is that of another mode, see `drawn`.
    draws: ClassVar[bool] = False

    def drawn(self, level: float) -> "Mode":
        """The mode of one pass of training, where these differ; `level` is uniform in [0, 1)."""
        return self

    def misfit(self, out_features: int, in_features: int, rank: int) -> str | None:
        """Why this mode cannot be used on an [out, in] layer with factors of `rank`, or None."""
        if rank == 0:
            return "it has no factors L and R (rank 0); mode 'append:r' gives it some"
        if self.number is not None and self.number > rank:
            return f"its factors have rank {rank}, the adapter asks for {self.number}"
        return None

    @abstractmethod
    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Name -> first value of each tensor to train, float32; see `layer.LRQAdapterLayer` for the names.

        Args:
            L, R: factors of the layer.
            generator: of what is random.
        """

    def kept(self, L: Tensor, R: Tensor) -> dict[str, Tensor]:
        """Name -> value of each tensor that the mode needs to remember, float32."""
        return {}

    @abstractmethod
    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """The pair to apply instead of (L, R).

        Args:
            L, R: factors of the layer, in the dtype of `own`.
            own: what `trained` and `kept` began with, as it is now.
        """

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """A pair whose product is L' R' - L R; in it, what rounding loses is relative to the change alone."""
        new_L, new_R = self.product(L, R, own)
        return concatenated([(new_L - L, new_R), (L, new_R - R)])


@dataclass(frozen=True)
class All(Mode):
    """Train copies of both factors."""

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        return {"lrq_L": L.float().clone(), "lrq_R": R.float().clone()}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return own["lrq_L"], own["lrq_R"]


@dataclass(frozen=True)
class Head(Mode):
    """Train copies of the first columns of L and rows of R; the others stay (as CALDERA's ft_rank does, 2024)."""

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        return {"lrq_L": L[:, : self.number].float().clone(), "lrq_R": R[: self.number].float().clone()}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return concatenated([(own["lrq_L"], own["lrq_R"]), (L[:, self.number :], R[self.number :])])

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`; of the trained ranks alone."""
        return All().change(L[:, : self.number], R[: self.number], own)


@dataclass(frozen=True)
class Append(Mode):
    """Train a pair of its own, for the inputs and outputs of the layer as they are (LoRA, 2022): W + L R."""

    outside: ClassVar[bool] = True

    def misfit(self, out_features: int, in_features: int, rank: int) -> str | None:
        """See `Mode`."""
        largest = min(out_features, in_features)
        if self.number is not None and self.number > largest:
            return f"a pair of {self.number} ranks is larger than it: at most {largest}"
        return None

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """L is zero, R uniform with the variance of a linear layer's initial weights."""
        assert self.number is not None, "parse_mode asks for it"
        bound = 1 / math.sqrt(R.shape[1])
        random = torch.rand(self.number, R.shape[1], generator=generator, device=generator.device)
        rows = ((2 * random - 1) * bound).to(R.device)
        return {"lrq_L": L.new_zeros(L.shape[0], self.number, dtype=torch.float32), "lrq_R": rows}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """The pair itself."""
        return own["lrq_L"], own["lrq_R"]

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """The pair itself."""
        return self.product(L, R, own)


@dataclass(frozen=True)
class CoreDiagonal(Mode):
    """Train one gain per rank, between frozen factors: L diag(1 + c) R (SVFit, 2024)."""

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        return {"lrq_C": L.new_zeros(L.shape[1], dtype=torch.float32)}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L + L * own["lrq_C"], R

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L * own["lrq_C"], R


@dataclass(frozen=True)
class Core(Mode):
    """Train a square matrix between frozen factors: L (I + C) R (LoRA-XS, 2024)."""

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        return {"lrq_C": L.new_zeros(L.shape[1], L.shape[1], dtype=torch.float32)}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L + L @ own["lrq_C"], R

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L @ own["lrq_C"], R


@dataclass(frozen=True)
class CoreRotation(Mode):
    """Turn the singular vectors of L R = U S V^T within their spans, and scale: U A S diag(1 + c) B^T V^T.

    A and B are rotations, Cayley transforms of what is trained (Spectral Adapter R, 2024). Written as a core
    between the factors as they are: with P = U^T L and N = R V, U = L N S^-1 and V^T = S^-1 P R.
    """

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        rank = L.shape[1]
        zeros = L.new_zeros(2, rank, rank, dtype=torch.float32)
        return {"lrq_turn": zeros, "lrq_C": zeros[0, 0].clone()}

    def kept(self, L: Tensor, R: Tensor) -> dict[str, Tensor]:
        """See `Mode`."""
        P, N = singular_anchors(L, R)
        return {"lrq_P": P, "lrq_N": N}

    def core(self, own: Tensors) -> Tensor:
        """C in L (I + C) R, [r, r]."""
        P, N = own["lrq_P"], own["lrq_N"]
        S = (P * N.T).sum(1)  # The diagonal of P N = U^T L R V.
        usable = SMALLEST_SINGULAR_VALUE * S.max() < S
        inverse = torch.where(usable, 1 / torch.where(usable, S, torch.ones_like(S)), torch.zeros_like(S))
        A, B = cayley(own["lrq_turn"]).to(S.dtype)
        K = (A * (S * (1 + own["lrq_C"]))) @ B.T - torch.diag(S)
        return (N * inverse) @ K @ (inverse.unsqueeze(1) * P)

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L + L @ self.core(own), R

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L @ self.core(own), R


@dataclass(frozen=True)
class Spectral(Mode):
    """Train additions to the leading singular vectors of L R = U S V^T: (U + A) S (V + B)^T (Spectral Adapter A, 2024).

    With P = U^T L and N = R V that is (L + A P) (R + N B^T), as P N = S: no rank is added, and no basis is changed.
    """

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """See `Mode`."""
        leading = L.shape[1] if self.number is None else self.number
        return {
            "lrq_U": L.new_zeros(L.shape[0], leading, dtype=torch.float32),
            "lrq_V": R.new_zeros(leading, R.shape[1], dtype=torch.float32),
        }

    def kept(self, L: Tensor, R: Tensor) -> dict[str, Tensor]:
        """See `Mode`."""
        P, N = singular_anchors(L, R)
        return {"lrq_P": P[: self.number].clone(), "lrq_N": N[:, : self.number].clone()}

    def product(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return L + own["lrq_U"] @ own["lrq_P"], R + own["lrq_N"] @ own["lrq_V"]

    def change(self, L: Tensor, R: Tensor, own: Tensors) -> Pair:
        """See `Mode`."""
        return concatenated(
            [(own["lrq_U"], own["lrq_P"] @ (R + own["lrq_N"] @ own["lrq_V"])), (L @ own["lrq_N"], own["lrq_V"])]
        )


def singular_anchors(L: Tensor, R: Tensor) -> Pair:
    """P = U^T L and N = R V for the singular vectors of L R = U S V^T, both [r, r], without forming L R.

    An adapter stores them: singular vectors that are computed again, on another machine, may come with other signs.
    """
    left = torch.linalg.qr(L.float(), mode="r").R
    right = torch.linalg.qr(R.float().T, mode="r").R
    U, _, Vt = torch.linalg.svd(left @ right.T)
    return U.T @ left, (Vt @ right).T


def cayley(X: Tensor) -> Tensor:
    """The rotations (I - K) (I + K)^-1 with K = (X - X^T) / 2, [..., n, n]; X = 0 gives I exactly.

    I + K is never singular, as the eigenvalues of K are imaginary.
    """
    X = X if X.dtype == torch.float64 else X.float()
    K = (X - X.mT) / 2
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    # The two factors commute.
    return torch.linalg.solve(eye + K, eye - K)


NUMBERS = {
    "no": "",
    "may": " or {name}:k",
    "must": ":k",
}  # Whether a number of ranks follows the name -> how it is shown.
_MODES: dict[str, tuple[type[Mode], str]] = {}


def register_mode(name: str, kind: type[Mode], number: str = "no") -> None:
    """Make a mode known by name, for `LRQAdapterConfig(mode=name)`. Idempotent.

    A saved adapter names its mode, so a program that loads it has to register the mode as well.

    Args:
        name: without a number; it may have a colon in it, as "core:diag" has.
        kind: what does it; a frozen dataclass.
        number: whether ":k" follows the name, k ranks: "no", "may" or "must".

    Raises:
        SpecError: if the name is that of another mode, or the class has a name already.
    """
    if number not in NUMBERS:
        raise SpecError(f"number must be one of {', '.join(map(repr, NUMBERS))}, got {number!r}.")
    for taken, (known, _) in _MODES.items():
        if (taken == name) != (known is kind):
            raise SpecError(f"mode {taken!r} is {known.__name__} already. Choose another name, or another class.")
    _MODES[name] = kind, number


def known_modes() -> dict[str, str]:
    """Name of each registered mode -> whether a number of ranks follows: "no", "may" or "must"."""
    return {name: number for name, (_, number) in _MODES.items()}


register_mode("all", All)
register_mode("head", Head, number="must")
register_mode("append", Append, number="must")
register_mode("core:diag", CoreDiagonal)
register_mode("core:full", Core)
register_mode("core:rotate", CoreRotation)
register_mode("spectral", Spectral, number="may")


def _shown() -> str:
    return ", ".join(name + NUMBERS[number].format(name=name) for name, number in known_modes().items())


def parse_mode(text: str) -> Mode:
    """The mode called `text`.

    Raises:
        SpecError: if there is no such mode, or its number is missing or wrong.

    >>> parse_mode("head:8")
    Head(number=8)
    """
    if not isinstance(text, str):
        raise SpecError(f"mode must be a text such as 'all', got {text!r}. Modes: {_shown()}.")
    if text in _MODES and _MODES[text][1] != "must":
        return _MODES[text][0]()
    name, _, number = (text, "", "") if text in _MODES else text.rpartition(":")
    kind, needs = _MODES.get(name, (None, ""))
    if kind is None:
        hint = did_you_mean(text, _MODES) or did_you_mean(name, _MODES)
        raise SpecError(f"Unknown mode {text!r}.{hint} Modes: {_shown()}.")
    if needs == "no":
        raise SpecError(f"mode {name!r} takes no number, got {text!r}.")
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise SpecError(f"mode {name!r} needs a number of ranks, as in '{name}:8'; got {text!r}.")
    return kind(int(number))


def with_number(mode: Mode, number: int) -> Mode:
    """The same mode with another number of ranks.

    Raises:
        SpecError: if it has none.
    """
    kinds = dict(_MODES.values())
    if kinds[type(mode)] == "no":
        raise SpecError(f"rank_pattern is for modes with a number of ranks; {type(mode).__name__} has none.")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SpecError(f"rank_pattern maps names to ranks of at least 1, got {number!r}.")
    return replace(mode, number=number)
