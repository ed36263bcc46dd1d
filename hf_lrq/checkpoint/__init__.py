"""Checkpoints on disk: their format, which `format` specifies, and the folders they are written to."""

from hf_lrq.checkpoint.folders import check_free, clear_disk_errors, staged_directory
from hf_lrq.checkpoint.format import (
    FORMAT_VERSION,
    LAYOUT_KEYS,
    QUANT_METHOD,
    QuantizationHeader,
    check_headers,
    parse_header,
)
from hf_lrq.checkpoint.leftovers import check_not_hidden
from hf_lrq.checkpoint.reading import check_places, header_of, quant_method_of, read_config, weight_files
from hf_lrq.checkpoint.records import check_record, listing, verify_tensors
from hf_lrq.safetensors_headers import FileHeader, Headers, float_dtype, headers_of, read_file_headers, read_headers

__all__ = [
    "FORMAT_VERSION",
    "LAYOUT_KEYS",
    "QUANT_METHOD",
    "FileHeader",
    "Headers",
    "QuantizationHeader",
    "check_free",
    "check_headers",
    "check_not_hidden",
    "check_places",
    "check_record",
    "clear_disk_errors",
    "float_dtype",
    "header_of",
    "headers_of",
    "listing",
    "parse_header",
    "quant_method_of",
    "read_config",
    "read_file_headers",
    "read_headers",
    "staged_directory",
    "verify_tensors",
    "weight_files",
]
