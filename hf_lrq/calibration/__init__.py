"""All matrices of a model: calibration data, activations one block at a time, compression in place."""

from hf_lrq.calibration.batches import Batch, make_batches
from hf_lrq.calibration.budgeting import Budgeted, fit_budget
from hf_lrq.calibration.compress import check_data, compress_model
from hf_lrq.calibration.inputs import input_grams
from hf_lrq.calibration.progress import Progress, SilentProgress, TqdmProgress

__all__ = [
    "Batch",
    "Budgeted",
    "Progress",
    "SilentProgress",
    "TqdmProgress",
    "check_data",
    "compress_model",
    "fit_budget",
    "input_grams",
    "make_batches",
]
