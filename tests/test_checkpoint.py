"""The format is strict: what is stored is read back, and whatever deviates is named."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_lrq.checkpoint import (
    FORMAT_VERSION,
    QuantizationHeader,
    check_headers,
    float_dtype,
    parse_header,
    read_headers,
    staged_directory,
)
from hf_lrq.errors import CheckpointError
from hf_lrq.layout import LayerLayout, TensorLayout

LAYOUT = LayerLayout(codebook="e8p2", rank=64)
OTHER = LayerLayout(codebook="int4", rank=0, factor_bits=8, group_size=64, rotation="none", rotation_block=128)


def stored(**changes: Any) -> dict[str, Any]:
    """A valid quantization_config with some changes; None removes a key."""
    data = QuantizationHeader(LAYOUT, {"a.b": OTHER}, ("lm_head",)).to_dict() | changes
    return {key: value for key, value in data.items() if value is not None}


def test_header_survives_json() -> None:
    header = QuantizationHeader.of(LAYOUT, {"a.b": OTHER, "a.c": LAYOUT}, ["lm_head"])
    again = parse_header(json.loads(json.dumps(header.to_dict())))
    assert again == header
    assert again.layout_for("a.b") == OTHER
    assert again.layout_for("a.c") == LAYOUT
    assert list(again.overrides) == ["a.b"]


def test_an_entry_holds_only_what_differs() -> None:
    layout = LayerLayout(codebook="e8p2", rank=32)
    assert QuantizationHeader.of(LAYOUT, {"x": layout}, []).to_dict()["modules"] == {"x": {"rank": 32}}
    layout = LayerLayout(codebook="e8p3", rank=64)
    assert QuantizationHeader.of(LAYOUT, {"x": layout}, []).to_dict()["modules"] == {
        "x": {"codebook": "e8p3", "bits": 3}
    }


def test_header_has_the_documented_keys_and_values() -> None:
    assert QuantizationHeader(LAYOUT).to_dict() == {
        "quant_method": "hf_lrq",
        "format_version": 1,
        "codebook": "e8p2",
        "bits": 2,
        "rank": 64,
        "factor_bits": 16,
        "group_size": 128,
        "rotation": "hadamard",
        "rotation_block": 256,
        "modules_to_not_convert": [],
        "modules": {},
    }


def test_newer_format_names_both_versions_and_the_way_out() -> None:
    # A newer version may have other keys as well; they must not hide the reason.
    with pytest.raises(CheckpointError, match=rf"format_version {FORMAT_VERSION + 1}.*up to version 2.*pip install -U"):
        parse_header(stored(format_version=FORMAT_VERSION + 1, trellis=True))


def test_a_header_is_written_in_the_lowest_version_that_can_say_it() -> None:
    layout = LayerLayout(codebook="int8", rank=0, rotation="none", group_size=32)
    for embeddings, version in (((), 1), (("a", "b"), 2)):
        header = QuantizationHeader.of(layout, {"a": layout, "b": layout}, [], embeddings)
        written = header.to_dict()
        assert (written["format_version"], written.get("embeddings", [])) == (version, list(embeddings))
        assert parse_header(written) == header


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'hf_lrq', got 'gptq'"),
        ({"format_version": None}, "format_version must be an integer from 1 to 2, got None"),
        ({"format_version": "1"}, "got '1'"),
        ({"format_version": 0}, "got 0"),
        ({"format_version": True}, "got True"),
        ({"rank": None}, "lacks rank"),
        ({"ranks": 3}, "unknown key 'ranks'. Did you mean 'rank'?"),
        ({"bits": "2"}, "bits must be an integer, got '2'"),
        ({"bits": 99}, "bits must be between 1 and 8, got 99"),
        ({"bits": 3}, "bits is 3, but codebook 'e8p2' has 2"),
        ({"rank": -1}, "rank must be between 0 and 65536"),
        ({"rank": 10**9}, "rank must be between 0 and 65536"),
        ({"rank": True}, "rank must be an integer, got True"),
        ({"codebook": "e8p9"}, "Unknown codebook 'e8p9'"),
        ({"codebook": ["e8p2"]}, "codebook must be a name"),
        ({"factor_bits": 5}, "factor_bits must be one of 4, 8, 16"),
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"rotation": "hadamrd"}, "Did you mean 'hadamard'?"),
        ({"rotation_block": 100}, "rotation_block must be a power of two"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of module names, got 'lm_head'"),
        ({"modules_to_not_convert": [1]}, "must be a list of module names"),
        ({"modules_to_not_convert": [""]}, "a module name has 0 characters"),
        ({"modules_to_not_convert": ["x" * 2000]}, "a module name has 2000 characters"),
        ({"modules": []}, "modules must be an object"),
        ({"modules": {"a": 1}}, r"modules\['a'\] must be an object, got 1"),
        ({"modules": {"a": {"rnak": 1}}}, r"modules\['a'\] has the unknown key 'rnak'. Did you mean 'rank'?"),
        ({"modules": {"a": {"bits": 4}}}, r"modules\['a'\]: bits is 4, but codebook 'e8p2' has 2"),
        ({"modules": {"a": {"rank": 1.5}}}, r"modules\['a'\]: rank must be an integer"),
        ({"embeddings": ["a"]}, "unknown key 'embeddings'"),
        ({"format_version": 2}, "lacks embeddings"),
        ({"format_version": 2, "embeddings": []}, "embeddings is empty, as in no checkpoint of format_version 2"),
        ({"format_version": 2, "embeddings": "a"}, "embeddings must be a list of module names, got 'a'"),
    ],
)
def test_a_damaged_header_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace("?", r"\?")):
        parse_header(stored(**changes))


def test_long_values_are_not_repeated_in_full() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_header(stored(modules_to_not_convert="x" * 10_000))
    assert len(str(caught.value)) < 300


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.zeros(4, 2, 2, dtype=torch.uint8), "a.scales": torch.ones(4, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_headers_are_read_without_tensors(file: Path) -> None:
    assert read_headers([file]) == {"a.weight": ("U8", (4, 2, 2)), "a.scales": ("F16", (4,))}


def test_an_empty_file_of_tensors_is_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert read_headers([tmp_path / "none.safetensors"]) == {}


@pytest.mark.parametrize("missing", [1, 20])
def test_a_truncated_file_is_named_with_its_sizes(file: Path, missing: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-missing])
    message = f"{re.escape(str(file))} should have {len(content)} bytes, it has {len(content) - missing}"
    with pytest.raises(CheckpointError, match=message):
        read_headers([file])


def test_a_file_cut_in_its_header_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"is truncated: the header alone takes \d+ bytes, the file has 50"):
        read_headers([file])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is missing\. Download or copy it"):
        read_headers([tmp_path / "model-00002-of-00002.safetensors"])


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, struct.pack("<Q", 0) + b"{}"])
def test_what_is_no_safetensors_file_is_named(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_headers([file])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "cannot be read"),
        (b"[1, 2]", "cannot be read"),
        (b'{"a": {"dtype": "U8"}}', "cannot be read"),
        (b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": ["0", "2"]}}', "cannot be read"),
        (b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 2]}}', "another length than its shape"),
    ],
)
def test_a_damaged_header_of_a_file_is_named(file: Path, header: bytes, message: str) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(CheckpointError, match=message):
        read_headers([file])


def test_a_tensor_in_two_files_is_refused(file: Path) -> None:
    copy = file.with_name("copy.safetensors")
    copy.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"'a\.\w+' is in .*copy.safetensors and in another file"):
        read_headers([file, copy])


EXPECTED = {
    "a.weight": TensorLayout((4, 2, 2), torch.uint8),
    "a.scales": TensorLayout((4,), torch.float16),
}


def test_headers_that_agree_pass(file: Path) -> None:
    check_headers(EXPECTED, read_headers([file]) | {"norm.weight": ("F32", (7,))})


@pytest.mark.parametrize(
    ("changes", "offender"),
    [
        ({"a.weight": ("U8", (4, 2, 3))}, r"a.weight: expected U8 \[4, 2, 2\], found U8 \[4, 2, 3\]"),
        ({"a.scales": ("BF16", (4,))}, r"a.scales: expected F16 \[4\], found BF16 \[4\]"),
        ({"a.scales": None}, r"a.scales: expected F16 \[4\], missing"),
        ({"a.lr_L": ("F16", (4, 1))}, r"a.lr_L: not expected, found F16 \[4, 1\]"),
    ],
)
def test_a_deviating_tensor_is_named(changes: dict[str, Any], offender: str) -> None:
    found = {"a.weight": ("U8", (4, 2, 2)), "a.scales": ("F16", (4,))} | changes
    with pytest.raises(CheckpointError, match=f"1 tensors do not match.*\n  {offender}"):
        check_headers(EXPECTED, {name: entry for name, entry in found.items() if entry is not None})


def test_ten_offenders_are_listed_and_the_rest_counted() -> None:
    expected = {f"m{n}.weight": TensorLayout((1,), torch.uint8) for n in range(13)}
    with pytest.raises(CheckpointError) as caught:
        check_headers(expected, {})
    assert str(caught.value).count("missing") == 10
    assert "and 3 more" in str(caught.value)


def test_float_dtype_of_names() -> None:
    assert float_dtype("BF16") == torch.bfloat16
    assert float_dtype("U8") == torch.float32
    assert float_dtype("F4") == torch.float32


def test_staged_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    with staged_directory(out) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "x").write_text("1")
        assert not out.exists()
    assert (out / "sub" / "x").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_everything_as_it_was(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text("old")

    def save() -> None:
        with staged_directory(out, overwrite=True) as staging:
            (staging / "config.json").write_text("new")
            raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        save()
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_rename_puts_the_old_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text("old")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, target)

    def save() -> None:
        with staged_directory(out, overwrite=True) as staging:
            (staging / "config.json").write_text("new")
            monkeypatch.setattr(Path, "rename", fail_for_the_new_one)

    with pytest.raises(OSError, match="no"):
        save()
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with staged_directory(tmp_path / "model") as staging:
        (staging / "x").write_text("1")
    assert (tmp_path / "model" / "x").read_text() == "1"


@pytest.mark.parametrize(
    ("content", "overwrite", "message"),
    [
        ("config.json", False, r"is not empty.*--overwrite \(overwrite=True in Python\)"),
        ("notes.txt", False, "is not empty"),
        ("notes.txt", True, "holds no model .* so it is not replaced"),
        ("config.json", True, "holds no model .* so it is not replaced"),
        ("config.json model.safetensors src/main.py", True, r"no part of a model \(src\), so it is not replaced"),
    ],
)
def test_a_directory_in_use_is_refused(tmp_path: Path, content: str, overwrite: bool, message: str) -> None:
    files = [tmp_path / name for name in content.split()]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    with pytest.raises(CheckpointError, match=message), staged_directory(tmp_path, overwrite):
        pytest.fail("the body must not run")
    assert all(file.read_text() == "mine" for file in files)


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The system does not rename it: hours of compression would end with "Device or resource busy".
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    message = f"{re.escape(str(tmp_path))} is a mount point.*for example {re.escape(str(tmp_path / 'model'))}"
    with pytest.raises(CheckpointError, match=message), staged_directory(tmp_path):
        pytest.fail("the body must not run")
    with staged_directory(tmp_path / "model") as staging:
        (staging / "x").write_text("1")
    assert (tmp_path / "model" / "x").read_text() == "1"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="is a file; a model is saved to a folder"),
        staged_directory(tmp_path / "x", overwrite=True),
    ):
        pytest.fail("the body must not run")


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (out / name).write_text("old")
    with staged_directory(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["config.json"]
