"""Checkpoints on disk: their format, which `format` specifies, and the folders they are written to."""

from hf_lrq.checkpoint.folders import check_free, staged_directory
from hf_lrq.checkpoint.format import (
    FORMAT_VERSION,
    LAYOUT_KEYS,
    QUANT_METHOD,
    QuantizationHeader,
    check_headers,
    parse_header,
)
from hf_lrq.checkpoint.reading import header_of, quant_method_of, read_config, weight_files
from hf_lrq.safetensors_headers import Headers, float_dtype, read_headers

__all__ = [
    "FORMAT_VERSION",
    "LAYOUT_KEYS",
    "QUANT_METHOD",
    "Headers",
    "QuantizationHeader",
    "check_free",
    "check_headers",
    "float_dtype",
    "header_of",
    "parse_header",
    "quant_method_of",
    "read_config",
    "read_headers",
    "staged_directory",
    "weight_files",
]
