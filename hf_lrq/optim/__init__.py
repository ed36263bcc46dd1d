"""Training weights that hold a low-rank product L R: preconditioned gradients, two optimizers, and an in-graph form."""

from hf_lrq.optim.in_graph import InGraph, PreconditionedFactor, precondition_gradients, precondition_in_graph
from hf_lrq.optim.pairs import FactorPair
from hf_lrq.optim.param_groups import factor_pairs, riemannian_param_groups
from hf_lrq.optim.precondition import precondition
from hf_lrq.optim.riemannian import RiemannianAdamW, RiemannianSGD
from hf_lrq.optim.row_scales import scale_gradients_by_rows

__all__ = [
    "FactorPair",
    "InGraph",
    "PreconditionedFactor",
    "RiemannianAdamW",
    "RiemannianSGD",
    "factor_pairs",
    "precondition",
    "precondition_gradients",
    "precondition_in_graph",
    "riemannian_param_groups",
    "scale_gradients_by_rows",
]
