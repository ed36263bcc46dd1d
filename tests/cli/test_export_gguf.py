"""`hf-lrq export-gguf`: what is written is read back with the package gguf, and is the compressed model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lrq import LRQConfig
from hf_lrq.cli.sources import source_of
from hf_lrq.errors import CheckpointError, LRQError, SpecError
from hf_lrq.integrations.gguf_export import export_gguf
from hf_lrq.nn import LRQLinear

gguf = pytest.importorskip("gguf")

STORED = {"codebook": "gguf", "bits": 4, "group_size": 32, "rotation": "none", "embedding_bits": 16, "iters": 1}
TENSOR = {"q_proj": "attn_q", "k_proj": "attn_k", "gate_proj": "ffn_gate", "down_proj": "ffn_down"}


def compressed_to(original: Path, **options: Any) -> Any:
    config = LRQConfig(**{**STORED, **options})
    return AutoModelForCausalLM.from_pretrained(original, quantization_config=config, dtype=torch.float32)


def read(path: Path) -> dict[str, Any]:
    """Name -> values, in the shape that torch has."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_blocks_and_adapter_are_the_weights(
    original: Path, gguf_file: Path, tmp_path: Path, rows_in_pairs: Any, bits: int, kind: str
) -> None:
    model = compressed_to(original, bits=bits, rank=4, factor_bits=16)
    written = export_gguf(model, gguf_file, tmp_path / "out")
    assert (written.matrices, written.most) == (14, 4)
    assert written.adapter is not None
    values, factors = read(written.model), read(written.adapter)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written.model).tensors}
    for name, target in TENSOR.items():
        (module, layer) = next((n, m) for n, m in model.named_modules() if n.endswith(f"layers.1.{_inside(name)}"))
        assert isinstance(layer, LRQLinear)
        stored = f"blk.1.{target}.weight"
        assert kinds[stored] == kind
        L, R = layer.low_rank()
        Q = rows_in_pairs(module, layer.dense() - L.float() @ R.float(), model.config)
        # The difference of dense and L R is rounded; the blocks themselves are compared bit for bit below.
        assert np.allclose(values[stored], Q.numpy(), rtol=0, atol=1e-6)
        assert (factors[f"{stored}.lora_a"] == R.float().numpy()).all()
        assert (factors[f"{stored}.lora_b"] == rows_in_pairs(module, L.float(), model.config).numpy()).all()


def _inside(name: str) -> str:
    return f"self_attn.{name}" if name[0] in "qk" else f"mlp.{name}"


def test_the_model_without_factors_computes_the_same(original: Path, gguf_file: Path, tmp_path: Path) -> None:
    model = compressed_to(original, rank=0)
    written = export_gguf(model, gguf_file, tmp_path / "out")
    assert written.adapter is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    again = source_of(str(written.model), None).model("float32", torch.device("cpu"))
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_metadata_is_that_of_the_original(original: Path, gguf_file: Path, tmp_path: Path) -> None:
    written = export_gguf(compressed_to(original, rank=2), gguf_file, tmp_path / "out")
    before, after = gguf.GGUFReader(gguf_file), gguf.GGUFReader(written.model)
    own = {name for name in before.fields if not name.startswith("GGUF.")}
    assert own <= after.fields.keys()
    assert all(before.get_field(name).contents() == after.get_field(name).contents() for name in own)
    assert after.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    adapter = gguf.GGUFReader(written.adapter)
    assert adapter.get_field("general.type").contents() == "adapter"
    assert adapter.get_field("adapter.type").contents() == "lora"
    assert adapter.get_field("adapter.lora.alpha").contents() == 0.0


def test_the_command(cli: Any, original: Path, gguf_file: Path, tmp_path: Path) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in STORED.items()]
    folder, out = tmp_path / "compressed", tmp_path / "out"
    result = cli("quantize", original, "-o", folder, *options, "--rank", 2, "--dataset", "none", "--no-eval")
    assert result.exit_code == 0, result.output
    result = cli("export-gguf", folder, "--like", gguf_file, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"llama-cli -m {out / 'model.gguf'} --lora {out / 'lora.gguf'}" in result.stderr.replace("\n", " ")
    assert {path.name for path in out.iterdir()} == {"model.gguf", "lora.gguf"}


def test_what_no_file_can_hold_is_refused(original: Path, gguf_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    turned = compressed_to(original, rotation="hadamard", rank=0)
    with pytest.raises(SpecError, match=r"layers\.0\.\S+ is stored with codebook 'gguf4', .* and rotation 'hadamard'"):
        export_gguf(turned, gguf_file, out)
    with pytest.raises(SpecError, match="has no compressed layers"):
        export_gguf(AutoModelForCausalLM.from_pretrained(original), gguf_file, out)
    assert not out.exists()


def test_files_of_other_models_are_refused(original: Path, gguf_file: Path, tmp_path: Path) -> None:
    model, out = compressed_to(original, rank=0), tmp_path / "out"
    with pytest.raises(LRQError, match="There is no file"):
        export_gguf(model, tmp_path / "none.gguf", out)
    (tmp_path / "text.gguf").write_text("a text that is long enough to be read as a header of a file")
    with pytest.raises(LRQError, match=r"text\.gguf cannot be read as a GGUF file"):
        export_gguf(model, tmp_path / "text.gguf", out)
    less = tmp_path / "less.gguf"
    less.write_bytes(gguf_file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(LRQError, match=r"less\.gguf has no tensor for model\.layers\.1\.mlp\.up_proj"):
        export_gguf(model, less, out)
    layer = model.model.layers[0].self_attn.q_proj
    layer.scales.data.neg_()
    with pytest.raises(LRQError, match=r"blk\.0\.attn_q\.weight of .* is not the original .* correlation is -0"):
        export_gguf(model, gguf_file, out)
    layer.scales.data.neg_()
    model.model.norm.weight.data.mul_(1.2)
    with pytest.raises(LRQError, match=r"model\.norm\.weight differs from output_norm\.weight"):
        export_gguf(model, gguf_file, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    model.model.norm.weight.data.div_(1.2)
    with pytest.raises(CheckpointError, match="is not empty"):
        export_gguf(model, gguf_file, out)
