"""W ~ Q + L R for one matrix. Torch only: no modules, no files, no Hugging Face."""

from hf_lrq.decomposition.compress_matrix import (
    CompressedMatrix,
    compress_matrix,
    generator_for,
    input_rotation,
    scale_problem,
)
from hf_lrq.decomposition.gram import DampedGram, GramAccumulator, InputGram, proxy_loss
from hf_lrq.decomposition.incoherence import RandomHadamard
from hf_lrq.decomposition.lowrank import LPLR, LowRankSolver, WhitenedSVD
from hf_lrq.decomposition.output_gram import OutputGram, OutputGramAccumulator
from hf_lrq.decomposition.qlr import Decomposition, decompose
from hf_lrq.decomposition.quantizers import LDLQ, Quantizer, RoundToNearest
from hf_lrq.decomposition.schedule import (
    Complete,
    Refit,
    Round,
    Schedule,
    Stage,
    Step,
    Sweep,
    alternating,
    check_schedule,
    get_schedule,
    register_schedule,
)

__all__ = [
    "LDLQ",
    "LPLR",
    "Complete",
    "CompressedMatrix",
    "DampedGram",
    "Decomposition",
    "GramAccumulator",
    "InputGram",
    "LowRankSolver",
    "OutputGram",
    "OutputGramAccumulator",
    "Quantizer",
    "RandomHadamard",
    "Refit",
    "Round",
    "RoundToNearest",
    "Schedule",
    "Stage",
    "Step",
    "Sweep",
    "WhitenedSVD",
    "alternating",
    "check_schedule",
    "compress_matrix",
    "decompose",
    "generator_for",
    "get_schedule",
    "input_rotation",
    "proxy_loss",
    "register_schedule",
    "scale_problem",
]
