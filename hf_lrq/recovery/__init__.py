"""Recovery after compression: what was not compressed away learns from the original model, without labels."""

from hf_lrq.recovery.options import RecoveryOptions
from hf_lrq.recovery.progress import RecoveryProgress, TqdmRecoveryProgress
from hf_lrq.recovery.recover import recover
from hf_lrq.recovery.report import RecoveryInterrupted, RecoveryReport, RecoveryStep
from hf_lrq.recovery.teacher import RecordedTeacher, record_teacher

__all__ = [
    "RecordedTeacher",
    "RecoveryInterrupted",
    "RecoveryOptions",
    "RecoveryProgress",
    "RecoveryReport",
    "RecoveryStep",
    "TqdmRecoveryProgress",
    "record_teacher",
    "recover",
]
