"""`hf-lrq verify` and `inspect` say of a damaged model what loading says."""

import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_lrq import LRQConfig, compress


def test_verify_counts_tensors_and_names_the_first_that_differs(cli, original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    compress(model, None, LRQConfig(bits=4, codebook="int", rank=2, iters=1, rounding="nearest"))
    model.save_pretrained(tmp_path / "good")
    result = cli("verify", str(tmp_path / "good"))
    assert result.exit_code == 0, result.stderr
    assert "tensors are what was saved" in result.stdout
    damaged = shutil.copytree(tmp_path / "good", tmp_path / "bad")
    file = next(damaged.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = cli("verify", str(damaged))
    assert result.exit_code == 2
    assert "1 tensors are not what they were when the model was saved" in result.stderr
    assert cli("inspect", str(damaged)).exit_code == 0
    (damaged / "config.json").write_text("[" * 100_000)
    for command in ("verify", "inspect"):
        result = cli(command, str(damaged))
        assert result.exit_code == 2
        assert "is not JSON" in result.stderr


def test_what_is_not_compressed_cannot_be_verified(cli, original: Path) -> None:
    result = cli("verify", str(original))
    assert result.exit_code == 2
    assert "is not compressed by hf_lrq" in result.stderr
