"""What lies beside the weights of a model comes along: loaded and saved, or copied; code does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)

from hf_lrq.checkpoint import check_free
from hf_lrq.integrations.companions import companions_of

VIT = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.25, 0.5, 0.75],
    "image_std": [0.5, 0.5, 0.5],
}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def saved(source: Path, out: Path, tokenizer: Any = None) -> Path:
    out.mkdir()
    companions_of(str(source), tokenizer).save_pretrained(out)
    return out


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1, "a": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_an_image_processor_comes_along(tmp_path: Path) -> None:
    source = write(tmp_path / "vit", preprocessor_config=VIT, config={"model_type": "vit"})
    out = saved(source, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"preprocessor_config.json"}
    write(out, config={"model_type": "vit"})
    assert [*AutoImageProcessor.from_pretrained(out).image_mean] == VIT["image_mean"]


def test_a_feature_extractor_comes_along(tmp_path: Path) -> None:
    source = write(tmp_path / "whisper", config={"model_type": "whisper"})
    WhisperFeatureExtractor(feature_size=20).save_pretrained(source)
    out = saved(source, tmp_path / "out")
    assert WhisperFeatureExtractor.from_pretrained(out).feature_size == 20


def test_a_processor_of_images_and_text_comes_along_with_its_chat_template(tmp_path: Path) -> None:
    images = AutoImageProcessor.from_pretrained(write(tmp_path / "vit", preprocessor_config=VIT))
    processor = LlavaProcessor(images, tokenizer(), patch_size=8, chat_template="{{ messages }}")
    source = write(tmp_path / "llava", config={"model_type": "llava"})
    processor.save_pretrained(source)
    out = saved(source, tmp_path / "out", tokenizer())
    write(out, config={"model_type": "llava"})
    again = AutoProcessor.from_pretrained(out)
    assert type(again) is LlavaProcessor
    assert (again.chat_template, again.patch_size, again.tokenizer.vocab_size) == ("{{ messages }}", 8, 3)
    assert [*again.image_processor.image_mean] == VIT["image_mean"]


def test_what_cannot_be_loaded_is_copied_and_code_is_not(tmp_path: Path) -> None:
    unknown = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own--processing.Own"}}
    source = write(
        tmp_path / "own", preprocessor_config=unknown, tokenizer_config={"auto_map": {"AutoTokenizer": ["tok.T", None]}}
    )
    (source / "processing.py").write_text("raise SystemExit('executed')")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.bin").write_bytes(b"mine")
    found = companions_of(str(source))
    assert found.obstacle
    assert found.code() == ["processing.py", "tok.py"]
    out = saved(source, tmp_path / "out")
    names = {"preprocessor_config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        name: (source / name).read_bytes() for name in names
    }


def test_the_modules_of_a_sentence_transformer_come_along_and_lead_nowhere_else(tmp_path: Path) -> None:
    paths = ["", "1_Pooling", "../elsewhere", "/1_Pooling", 3]
    source = write(
        tmp_path / "sentences",
        modules=[*({"path": path, "type": "x"} for path in paths), "no module"],
        sentence_bert_config={"max_seq_length": 16},
    )
    write(source / "1_Pooling", config={"pooling_mode_mean_tokens": True})
    write(tmp_path / "elsewhere", config={})
    out = saved(source, tmp_path / "out")
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert copied == {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    write(out, config={})
    (out / "model.safetensors").write_bytes(b"")
    check_free(out, overwrite=True)


@pytest.mark.parametrize("content", ["", "[1]", '{"auto_map": 3}', "3"])
def test_files_that_are_damaged_are_copied_as_they_are(tmp_path: Path, content: str) -> None:
    source = write(tmp_path / "model")
    (source / "preprocessor_config.json").write_text(content)
    assert companions_of(str(source)).code() == []
    assert (saved(source, tmp_path / "out") / "preprocessor_config.json").read_text() == content
