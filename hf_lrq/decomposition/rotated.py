"""A matrix and its Grams in the coordinates in which it is rounded."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram, InputGram, damp
from hf_lrq.decomposition.incoherence import RandomHadamard
from hf_lrq.decomposition.metric import METRICS, OUTPUT_METRICS
from hf_lrq.decomposition.output_gram import OutputGram
from hf_lrq.errors import CompressionError
from hf_lrq.matrices import Pair
from hf_lrq.spec import LayerSpec

OUTPUT_DAMPING = 1e-3  # An estimator has shrunk the Gram of the outputs; this is for the Cholesky factorisation alone.


@dataclass(frozen=True, eq=False)
class Rotated:
    """U W V^T, and what it is rounded and fitted under.

    Attributes:
        W: U W V^T, [out, in] float32.
        gram: V H V^T, damped.
        fit: what L R are fitted under, see `metric`; rotated and damped.
        output: U H_O U^T, damped; None where all outputs count alike.
        fit_output: what L R are fitted under at the outputs, rotated and damped; None as above.
        rotate_in: V on the inputs, or None.
        rotate_out: U on the outputs, or None.
    """

    W: Tensor
    gram: DampedGram
    fit: DampedGram
    output: DampedGram | None
    rotate_in: RandomHadamard | None
    rotate_out: RandomHadamard | None
    fit_output: DampedGram | None = None

    def pair(self, L: Tensor, R: Tensor) -> Pair:
        """Factors of U L R V^T."""
        if self.rotate_in is None or self.rotate_out is None:
            return L, R
        return self.rotate_out.apply(L.T).T, self.rotate_in.apply(R)


def rotate(
    W: Tensor,
    gram: InputGram,
    spec: LayerSpec,
    generator: torch.Generator,
    rotate_in: RandomHadamard | None = None,
    output: OutputGram | None = None,
) -> Rotated:
    """Rotate W [out, in] float32 and its Grams as `spec` says, and damp them.

    Args:
        W: the weight.
        gram: second moment of the inputs.
        spec: says whether and how to rotate, and what L R are fitted under.
        generator: draws the rotations.
        rotate_in: rotation of the inputs, to share it between matrices; None draws one.
        output: second moment of the gradients at the outputs, if any.

    Raises:
        CompressionError: if a Gram is for another width, or does not hold what the metric takes.
    """
    if len(gram.H) != W.shape[1]:
        raise CompressionError(f"the Gram is for {len(gram.H)} inputs, the weight has {W.shape[1]} columns.")
    if output is not None and len(output.H) != W.shape[0]:
        raise CompressionError(f"the output Gram is for {len(output.H)} outputs, the weight has {W.shape[0]} rows.")
    H, H_out = gram.H.to(W.device), None if output is None else output.H.to(W.device)
    metric = None if spec.metric == "gram" else METRICS[spec.metric](gram).to(W.device)
    weigh = OUTPUT_METRICS.get(spec.metric)
    metric_out = None if H_out is None or weigh is None else weigh(H_out)
    rotate_out = None
    if spec.rotation == "none":
        rotate_in = None
    else:
        rotate_in = rotate_in or RandomHadamard.sample(W.shape[1], generator, spec.rotation_block)
        rotate_out = RandomHadamard.sample(W.shape[0], generator, spec.rotation_block)
        W = rotate_out.apply(rotate_in.apply(W).T).T.contiguous()
        H = rotate_in.rotate_gram(H)
        metric = None if metric is None else rotate_in.rotate_gram(metric)
        H_out, metric_out = (None if each is None else rotate_out.rotate_gram(each) for each in (H_out, metric_out))
    damped = damp(H, spec.damp_percent)
    fit = damped if metric is None else damp(metric, spec.damp_percent)
    damped_out = None if H_out is None else damp(H_out, OUTPUT_DAMPING)
    fit_out = damped_out if metric_out is None else damp(metric_out, OUTPUT_DAMPING)
    return Rotated(W, damped, fit, damped_out, rotate_in, rotate_out, fit_out)
