"""All matrices of a model: calibration data, activations one block at a time, compression in place."""

from hf_lrq.calibration.batches import Batch, make_batches
from hf_lrq.calibration.compress import compress
from hf_lrq.calibration.inputs import input_grams
from hf_lrq.calibration.progress import Progress, SilentProgress, TqdmProgress
from hf_lrq.calibration.records import CompressionReport, LayerRecord
from hf_lrq.calibration.targets import Target, TargetList, find_targets

__all__ = [
    "Batch",
    "CompressionReport",
    "LayerRecord",
    "Progress",
    "SilentProgress",
    "Target",
    "TargetList",
    "TqdmProgress",
    "compress",
    "find_targets",
    "input_grams",
    "make_batches",
]
