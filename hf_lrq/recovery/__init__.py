"""Recovery after compression: what was not compressed away learns from the original model, without labels."""

from hf_lrq.recovery.errors import RecoveryError, RecoveryInterrupted
from hf_lrq.recovery.options import RecoveryOptions
from hf_lrq.recovery.progress import TqdmRecovery
from hf_lrq.recovery.recover import recover
from hf_lrq.recovery.report import RecoveryReport, RecoveryStep
from hf_lrq.recovery.teacher import RecordedTeacher, record_teacher

__all__ = [
    "RecordedTeacher",
    "RecoveryError",
    "RecoveryInterrupted",
    "RecoveryOptions",
    "RecoveryReport",
    "RecoveryStep",
    "TqdmRecovery",
    "record_teacher",
    "recover",
]
