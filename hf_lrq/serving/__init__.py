"""What a serving engine needs of compressed checkpoints, in torch alone: headers, parts of layers, shards."""

from hf_lrq.serving.experts import routed_experts
from hf_lrq.serving.headers import check_files, compressed_modules, local_headers, read_header
from hf_lrq.serving.options import Way, read_way
from hf_lrq.serving.parts import Part, PlainPart
from hf_lrq.serving.shards import Shard, in_one_matrix

__all__ = [
    "Part",
    "PlainPart",
    "Shard",
    "Way",
    "check_files",
    "compressed_modules",
    "in_one_matrix",
    "local_headers",
    "read_header",
    "read_way",
    "routed_experts",
]
