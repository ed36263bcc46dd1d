"""From a spec to a compressed matrix: the one place where the strings of a spec become objects."""

import functools
import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lrq.decomposition.correction import corrected
from hf_lrq.decomposition.fitted import FittedNearest
from hf_lrq.decomposition.gram import InputGram
from hf_lrq.decomposition.incoherence import RandomHadamard
from hf_lrq.decomposition.kept import Kept
from hf_lrq.decomposition.lowrank import LPLR, LowRankSolver, WhitenedSVD, rank_above
from hf_lrq.decomposition.output_gram import OutputGram
from hf_lrq.decomposition.qlr import Decomposition, decompose
from hf_lrq.decomposition.quantizers import LDLQ, Quantizer, RoundToNearest
from hf_lrq.decomposition.rotated import rotate
from hf_lrq.decomposition.schedule import ALTERNATING, Schedule, alternating, get_schedule
from hf_lrq.decomposition.starts import STARTS, TRIED, Setting
from hf_lrq.errors import CompressionError
from hf_lrq.layout import LayerLayout
from hf_lrq.matrices import QuantizedMatrix
from hf_lrq.numerics import fixed_numerics
from hf_lrq.spec import LayerSpec

SMALLEST_RMS, LARGEST_RMS = 1e-5, 1e4


@dataclass(frozen=True, eq=False)
class CompressedMatrix:
    """Q + L R of the rotated weight, and the rotations.

    Attributes:
        decomposition: what U W V^T became.
        rotate_in: V on the inputs, or None.
        rotate_out: U on the outputs, or None.
        layout: how the matrix lies on disk.
        damping: fraction of the mean diagonal that was added to the Gram.
        steps: what the damping had to do beyond its first attempt.
        n_tokens: tokens that the Gram averages; 0 is data-free.
        output_shrinkage: share of the identity in the Gram of the outputs, None without one.
    """

    decomposition: Decomposition
    rotate_in: RandomHadamard | None
    rotate_out: RandomHadamard | None
    layout: LayerLayout
    damping: float
    steps: tuple[str, ...]
    n_tokens: int
    output_shrinkage: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        quantized = self.decomposition.quantized
        return quantized.out_features, quantized.in_features

    @property
    def proxy_loss(self) -> float:
        """Relative proxy loss tr(E H E^T) / tr(W H W^T) under the damped Gram."""
        return self.decomposition.proxy_loss

    @property
    def trace(self) -> tuple[float, ...]:
        """Relative proxy loss after each iteration."""
        return self.decomposition.trace

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight, everything stored included."""
        return self.layout.bits_per_weight(*self.shape)

    def dense(self) -> Tensor:
        """The weight that the layer applies, [out, in] float32."""
        W = self.decomposition.dense()
        if self.rotate_in is not None:
            W = self.rotate_in.undo(W)
        if self.rotate_out is not None:
            W = self.rotate_out.undo(W.T).T
        return W

    def tensors(self) -> dict[str, Tensor]:
        """Exactly what is stored, by name; see `layout.LayerLayout.tensors`."""
        quantized, low_rank = self.decomposition.quantized, self.decomposition.low_rank
        stored = {"weight": quantized.packed, "scales": quantized.scales}
        if self.rotate_in is not None and self.rotate_out is not None:
            stored |= {"rot_in": self.rotate_in.signs.half(), "rot_out": self.rotate_out.signs.half()}
        if low_rank.rank:
            stored |= {"lr_L": low_rank.L.data, "lr_R": low_rank.R.data}
            if low_rank.L.scale is not None and low_rank.R.scale is not None:
                stored |= {"lr_L_scale": low_rank.L.scale, "lr_R_scale": low_rank.R.scale}
        return {name: tensor.contiguous() for name, tensor in stored.items()}


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a name only, so visiting order does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def input_rotation(seed: int, module_name: str, in_features: int, spec: LayerSpec) -> RandomHadamard | None:
    """The rotation of a module's inputs: the same for all linears of one parent, so q, k, v share one transform."""
    if spec.rotation == "none":
        return None
    parent = module_name.rpartition(".")[0]
    return RandomHadamard.sample(in_features, generator_for(seed, f"{parent}/in{in_features}"), spec.rotation_block)


def compress_matrix(
    W: Tensor,
    gram: InputGram | None,
    spec: LayerSpec,
    generator: torch.Generator,
    rotate_in: RandomHadamard | None = None,
    schedule: Schedule | None = None,
    output: OutputGram | None = None,
    kept: QuantizedMatrix | None = None,
) -> CompressedMatrix:
    """Compress one weight matrix as `spec` says.

    Args:
        W: [out, in] weight, any float dtype; computed in float32 on its device.
        gram: second moment of the inputs; None compresses without data (H = I).
        spec: what to do.
        generator: source of every random choice; equal states give equal bytes, with any number of threads and
            whatever torch is set to (see `numerics`).
        rotate_in: rotation of the inputs, to share it between matrices; None draws one.
        schedule: what to do instead of that of the spec; see `decomposition.schedule`.
        output: second moment of the gradients at the outputs; None weighs all outputs alike.
        kept: Q, where it is known already: nothing is rounded, whatever the spec says of that.

    Raises:
        CompressionError: if W is not a matrix, is empty, or holds NaN or Inf; if a Gram is for another width; if the
            schedule ends with factors of another rank than the spec stores; if Q is known and does not fit the spec.
    """
    with fixed_numerics(W.device):
        W = _checked(W)
        spec = spec.fitted((W.shape[0], W.shape[1]))
        if spec.rank is None and spec.rank_threshold is not None:
            spec = replace(spec, rank=rank_above(W, spec.rank_threshold))
        return _compress(W, gram, spec, generator, rotate_in, schedule, output, kept)


def _compress(
    W: Tensor,
    gram: InputGram | None,
    spec: LayerSpec,
    generator: torch.Generator,
    rotate_in: RandomHadamard | None,
    schedule: Schedule | None,
    output: OutputGram | None,
    kept: QuantizedMatrix | None,
) -> CompressedMatrix:
    """See `compress_matrix`; W is float32 and finite."""
    gram = InputGram.identity(W.shape[1], W.device) if gram is None else gram
    W = corrected(W, gram, spec.correction)
    rotated = rotate(W, gram, spec, generator, rotate_in, output)
    rank = min(_rank(spec), *W.shape)
    at = Setting(W, gram.H.to(W.device), rotated, rank, generator)
    run = functools.partial(
        decompose,
        rotated.W,
        rotated.gram,
        _quantizer(spec) if kept is None else Kept.of(kept, spec, W),
        _solver(spec),
        generator,
        output=rotated.output,
        fit=rotated.fit,
        fit_output=rotated.fit_output,
    )
    init = spec.init
    if init == "auto":
        short = schedule or _schedule(replace(spec, iters=1, refinements=0))
        trials = {name: run(start=STARTS[name](at), schedule=short).proxy_loss for name in TRIED}
        init = min(trials, key=trials.__getitem__)
    decomposition = run(start=STARTS[init](at), schedule=schedule or _schedule(spec))
    if decomposition.low_rank.rank != rank:
        raise CompressionError(
            f"the schedule ended with factors of rank {decomposition.low_rank.rank}, the spec stores rank {rank}. "
            'Add a Refit() to the schedule, or start from init="svd".'
        )
    return CompressedMatrix(
        decomposition,
        rotated.rotate_in,
        rotated.rotate_out,
        spec.layout,
        rotated.gram.damping,
        rotated.gram.steps,
        gram.n_tokens,
        None if output is None else output.shrinkage,
    )


def scale_problem(W: Tensor) -> str | None:
    """What is wrong with the magnitude of a finite weight matrix; None if it can be compressed, as zeros can."""
    rms = W.detach().float().square().mean().sqrt().item()
    # Not rms != 0, or weights whose squares underflow would pass for zeros.
    if not W.any() or SMALLEST_RMS <= rms <= LARGEST_RMS:
        return None
    return (
        f"the weight has a root mean square of {rms:.3g}; scales are stored in float16, which allows "
        f"{SMALLEST_RMS:g} to {LARGEST_RMS:g}"
    )


def _checked(W: Tensor) -> Tensor:
    if W.ndim != 2 or 0 in W.shape:
        raise CompressionError(f"a weight matrix has shape [out, in], got {tuple(W.shape)}.")
    if not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        raise CompressionError(f"the weight holds {bad} values that are NaN or Inf. Repair or re-download the model.")
    W = W.detach().float()
    if (problem := scale_problem(W)) is not None:
        raise CompressionError(f"{problem}. Rescale the layer, or leave it out with modules_to_not_convert.")
    return W


def _quantizer(spec: LayerSpec) -> Quantizer:
    nearest = {"nearest": RoundToNearest, "fitted": FittedNearest}.get(spec.rounding)
    if nearest is not None:
        return nearest(spec.resolved_codebook, spec.group_size)
    return LDLQ(spec.resolved_codebook, spec.group_size, sweeps=spec.sweeps)


def _solver(spec: LayerSpec) -> LowRankSolver:
    rank = _rank(spec)
    return WhitenedSVD(rank) if spec.factor_bits == 16 else LPLR(rank, bits=spec.factor_bits)


def _rank(spec: LayerSpec) -> int:
    assert spec.rank is not None, "fitted to the matrix"
    return spec.rank


def _schedule(spec: LayerSpec) -> Schedule:
    """What `schedule`, `iters`, `refinements` and `marginal_damping` stand for, and the sweep that comes last.

    Without factors there is nothing to alternate with, and Q is swept last only where the spec wants sweeps at all.
    """
    if spec.schedule != ALTERNATING:
        return get_schedule(spec.schedule, spec.iters)
    if spec.rank:
        return alternating(spec.iters, spec.refinements, spec.marginal_damping)
    return alternating(1, 0, spec.marginal_damping, closing=bool(spec.sweeps or spec.refinements))
