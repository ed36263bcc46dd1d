"""Headers as engines hand them over, and files that lack something."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hf_lrq.checkpoint import QuantizationHeader
from hf_lrq.digests import fingerprint
from hf_lrq.errors import CheckpointError
from hf_lrq.layout import LayerLayout
from hf_lrq.safetensors_headers import dtype_name
from hf_lrq.serving import check_files, compressed_modules, local_headers, read_header

LAYOUT = LayerLayout(codebook="bt2", rank=4, factor_bits=8)
HEADER = QuantizationHeader(LAYOUT, modules_to_not_convert=("lm_head",))


@pytest.fixture
def headers():
    """Two compressed modules, one of them a stack, and what is not compressed."""
    found = {"m.gate.weight": ("BF16", (4, 256)), "m.q_proj.bias": ("BF16", (256,))}
    for name, stack in (("m.q_proj", ()), ("m.experts.qstack_down_proj", (4,))):
        for key, tensor in LAYOUT.tensors(256, 256).items():
            found[f"{name}.{key}"] = (dtype_name(tensor.dtype), (*stack, *tensor.shape))
    return found


def test_what_engines_add_to_a_header_is_theirs():
    added = {"packed_modules_mapping": {"qkv_proj": ["q_proj"]}, "hf_config": object()}
    assert read_header({**HEADER.to_dict(), **added}) == HEADER


def test_a_header_is_read_strictly_otherwise():
    with pytest.raises(CheckpointError, match="unknown key 'ranks'"):
        read_header({**HEADER.to_dict(), "ranks": 3})


def test_compressed_is_what_has_scales(headers):
    assert compressed_modules(headers) == {"m.q_proj", "m.experts.qstack_down_proj"}


def test_complete_files_pass(headers):
    check_files(HEADER, headers)


@pytest.mark.parametrize("name", ["m.q_proj.lr_L", "m.q_proj.weight", "m.experts.qstack_down_proj.rot_out"])
def test_a_missing_tensor_is_named(headers, name):
    del headers[name]
    with pytest.raises(CheckpointError, match=rf"{name}: .*missing"):
        check_files(HEADER, headers)


def test_a_tensor_too_many_is_named(headers):
    headers["m.q_proj.ft_L"] = ("F16", (256, 4))
    with pytest.raises(CheckpointError, match=r"m\.q_proj\.ft_L: not expected"):
        check_files(HEADER, headers)


def test_files_without_any_compressed_matrix_are_refused():
    with pytest.raises(CheckpointError, match="no file holds the scales"):
        check_files(HEADER, {"m.q_proj.weight": ("BF16", (256, 256))})


def test_files_in_a_folder_are_compared_with_their_record(tmp_path):
    digests = json.dumps({"m.weight": "0" * 16, "m.scales": "0" * 16})
    record = {"hf_lrq_header": fingerprint(HEADER.to_dict()), "hf_lrq_digests": digests}
    tensors = {"m.weight": torch.zeros(2, dtype=torch.uint8), "m.scales": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata=record)
    assert local_headers(HEADER, tmp_path) == {"m.weight": ("U8", (2,)), "m.scales": ("F32", (3,))}
    with pytest.raises(CheckpointError, match="is not what it was"):
        local_headers(replace(HEADER, modules_to_not_convert=()), tmp_path)
    del tensors["m.scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata=record)
    with pytest.raises(CheckpointError, match=r"m\.scales: missing"):
        local_headers(HEADER, tmp_path)
