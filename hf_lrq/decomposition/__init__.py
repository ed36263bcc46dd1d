"""W ~ Q + L R for one matrix. Torch only: no modules, no files, no Hugging Face."""

from hf_lrq.decomposition.compress_matrix import CompressedMatrix, compress_matrix, generator_for, input_rotation
from hf_lrq.decomposition.gram import DampedGram, GramAccumulator, InputGram, proxy_loss
from hf_lrq.decomposition.incoherence import RandomHadamard
from hf_lrq.decomposition.lowrank import LPLR, LowRankSolver, WhitenedSVD
from hf_lrq.decomposition.qlr import Decomposition, decompose
from hf_lrq.decomposition.quantizers import LDLQ, Quantizer, RoundToNearest

__all__ = [
    "LDLQ",
    "LPLR",
    "CompressedMatrix",
    "DampedGram",
    "Decomposition",
    "GramAccumulator",
    "InputGram",
    "LowRankSolver",
    "Quantizer",
    "RandomHadamard",
    "RoundToNearest",
    "WhitenedSVD",
    "compress_matrix",
    "decompose",
    "generator_for",
    "input_rotation",
    "proxy_loss",
]
