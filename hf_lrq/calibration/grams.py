"""Gram matrices of many inputs at once: equal inputs share one, and results do not depend on the number of threads."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition import GramAccumulator, InputGram
from hf_lrq.decomposition.gram import FOLD_TOKENS
from hf_lrq.errors import CalibrationError
from hf_lrq.numerics import full_precision
from hf_lrq.work import Executor
from hf_lrq.work.plan import listed

STRIP = 512  # Rows of a Gram computed at a time: enough to keep a thread busy, and never dependent on their number.

# Input rows [tokens, in] of each matrix in one pass of the model, in call order. Equal inputs are the same object.
Rows = Mapping[str, Sequence[Tensor]]


@dataclass
class _SharedGram:
    """A Gram, being summed, of matrices that have seen the same inputs so far."""

    members: list[str]
    accumulator: GramAccumulator | None = None


class GramStore:
    """Sums x x^T for the inputs of several matrices.

    Matrices that share their inputs (query, key and value; gate and up) share one sum, until a pass in which they
    do not.

    Args:
        names: of the matrices.
    """

    def __init__(self, names: Sequence[str]):
        self._groups = [_SharedGram(list(names))] if names else []

    @property
    def shared(self) -> list[tuple[str, ...]]:
        """The names that share one sum, for each sum."""
        return [tuple(group.members) for group in self._groups if group.accumulator is not None]

    def add(
        self,
        passes: Sequence[Rows],
        batches: Sequence[int],
        workers: Executor,
        originals: Sequence[Rows] | None = None,
    ) -> None:
        """Add some passes of the model, in their order.

        Args:
            passes: the inputs of each.
            batches: which batch each was over, for errors.
            workers: to spread the work over.
            originals: the inputs of the same matrices in the original model, row for row, see `of_all_tokens`; None
                where those are the same.

        Raises:
            CalibrationError: if an input holds NaN or Inf; names its matrices and the batch.
        """
        self._groups = [part for group in self._groups for part in _split(group, passes)]
        strips: list[tuple[_SharedGram, int]] = []
        for group in self._groups:
            seen = [rows for each in passes for rows in each.get(group.members[0], ())]
            if not seen:
                continue
            if group.accumulator is None:
                group.accumulator = GramAccumulator(seen[0].shape[-1], seen[0].device)
                if originals is not None:
                    group.accumulator.cross = torch.zeros_like(group.accumulator.total)
            group.accumulator.n_tokens += sum(len(rows) for rows in seen)
            if not all(group.members[0] in each for each in originals or ()):
                group.accumulator.cross = None
            strips += [(group, start) for start in range(0, seen[0].shape[-1], STRIP)]

        def add_strip(strip: tuple[_SharedGram, int]) -> None:
            group, start = strip
            assert group.accumulator is not None, "made above"
            device = group.accumulator.total.device
            for batch, each in zip(batches, passes, strict=True):
                for rows in each.get(group.members[0], ()):
                    with full_precision(device):  # The passes keep the user's settings, their Grams do not.
                        finite = _add_rows(group.accumulator, rows, start)
                    if not finite:
                        raise CalibrationError(
                            f"calibration batch {batch} makes inputs of {listed(group.members, 4)} that hold "
                            "NaN or Inf (or squares that overflow float32). Look for NaN weights before this module, "
                            "calibrate in bfloat16 or float32 instead of float16, or leave the batch out."
                        )

        workers.map(add_strip, strips)
        pairs = [*zip(passes, originals or [{}] * len(passes), strict=True)]
        workers.map(lambda strip: _add_cross(*strip, pairs), strips)

    def finish(self) -> tuple[dict[str, InputGram], dict[str, str]]:
        """The mean of each matrix's inputs, and name -> reason for those that have none. Frees the sums."""
        grams: dict[str, InputGram] = {}
        without: dict[str, str] = {}
        for group in self._groups:
            sums, group.accumulator = group.accumulator, None
            if sums is None or sums.n_tokens == 0:
                without |= dict.fromkeys(group.members, "no calibration token reached")
            elif not (sums.total.diagonal() > 0).any():
                without |= dict.fromkeys(group.members, "all calibration inputs are zero at")
            else:
                _mirror(sums.total)
                grams |= dict.fromkeys(group.members, sums.finish())
        return grams, without


def _split(group: _SharedGram, passes: Sequence[Rows]) -> Iterator[_SharedGram]:
    """Parts of a group whose members see the same inputs in all of these passes."""
    classes: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name in group.members:
        inputs = tuple(tuple(id(rows) for rows in each.get(name, ())) for each in passes)
        classes.setdefault(inputs, []).append(name)
    for index, members in enumerate(classes.values()):
        # Up to now they saw the same, so what has been summed holds for each part.
        yield _SharedGram(members, group.accumulator if index == 0 else copy.deepcopy(group.accumulator))


def _add_rows(sums: GramAccumulator, rows: Tensor, start: int) -> bool:
    """Add a strip of rows^T rows on and right of the diagonal, and of |rows|; False if the input is not finite."""
    stop = start + STRIP
    for piece in rows.split(FOLD_TOKENS):
        piece = piece.float()
        product = piece[:, start:stop].T @ piece[:, start:]
        # A non-finite input always leaves a non-finite diagonal.
        if not torch.isfinite(product.diagonal()).all():
            return False
        sums.total[start:stop, start:] += product
        sums.magnitudes[start:stop] += piece[:, start:stop].abs().sum(0)
    return True


def of_all_tokens(rows: Rows, others: Rows) -> Rows:
    """Those of `others`, inputs in the original model in the same pass, that are of the same tokens as `rows`.

    Routers send other tokens to an expert as soon as something is compressed; what is sent all of them sees the same.
    """
    most = max((len(one) for calls in (rows, others) for each in calls.values() for one in each), default=0)
    return {
        name: calls
        for name, calls in others.items()
        if len(calls) == len(rows.get(name, ())) and all(len(one) == most for one in (*calls, *rows[name]))
    }


def _add_cross(group: _SharedGram, start: int, passes: Sequence[tuple[Rows, Rows]]) -> None:
    """Add a strip of original^T rows, where that is kept."""
    total, name = None if group.accumulator is None else group.accumulator.cross, group.members[0]
    if total is None:
        return
    with full_precision(total.device):
        for each, original in passes:
            for rows, others in zip(each.get(name, ()), original.get(name, ()), strict=True):
                for x, z in zip(rows.split(FOLD_TOKENS), others.split(FOLD_TOKENS), strict=True):
                    total[start : start + STRIP] += z[:, start : start + STRIP].float().T @ x.float()


def _mirror(total: Tensor) -> None:
    """Fill what lies left of the strips' diagonal blocks."""
    for start in range(0, len(total), STRIP):
        total[start + STRIP :, start : start + STRIP] = total[start : start + STRIP, start + STRIP :].T
