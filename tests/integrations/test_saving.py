"""A saved model brings its report and its card, and an interrupted save leaves nothing behind."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_lrq import LRQConfig, compress
from hf_lrq.errors import CheckpointError, LRQError
from hf_lrq.integrations import saving
from hf_lrq.integrations.saving import save

PAPERS = ("README.md", "quantization_report.json")


class FakeHub:
    """Stands in for HfApi; remembers what was uploaded."""

    uploads: list[dict[str, Any]]

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self, **options: Any) -> str:
        folder = Path(options["folder_path"])
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.uploads.append({**options, "files": files})
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    FakeHub.uploads = []
    monkeypatch.setattr(saving, "HfApi", FakeHub)
    return FakeHub.uploads


@pytest.fixture
def model(original: Path, fast: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(original, quantization_config=LRQConfig(**fast))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_parameters_are_counted_as_in_the_original(original: Path, model: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(original)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.dequantize().num_parameters() == plain.num_parameters()


def test_parameters_of_experts_are_counted_as_in_the_original(fast: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**shape, vocab_size=64, num_key_value_heads=2, num_local_experts=3)
    experts = transformers.MixtralForCausalLM(config)
    before = experts.num_parameters()
    compress(experts, config=LRQConfig(**fast))
    assert experts.num_parameters() == before


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_save_writes_model_tokenizer_report_and_card(model: Any, tmp_path: Path) -> None:
    out = save(model, tmp_path / "out", tokenizer=Tokenizer(), base_model="org/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", *PAPERS} <= names(out)
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["base_model"]["hub_id"] == "org/model"
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["recipe"]["rank"] == 4
    assert report["seed"] == 0
    assert len(report["compression"]["layers"]) == 14
    assert report["size"]["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert ModelCard.load(out / "README.md").data.base_model == "org/model"


def test_predicted_bytes_are_those_of_the_file(model: Any, tmp_path: Path) -> None:
    report = json.loads((save(model, tmp_path / "out") / "quantization_report.json").read_text())
    assert report["size"]["predicted_bytes"] == pytest.approx(report["size"]["file_bytes"], rel=0.01)


def test_no_path_of_this_machine_is_published(model: Any, original: Path, tmp_path: Path) -> None:
    out = save(model, tmp_path / "out")
    for name in (*PAPERS, "config.json"):
        assert str(original.parent) not in (out / name).read_text()


def test_evaluation_and_report_are_taken_over(model: Any, tmp_path: Path) -> None:
    report = model.hf_quantizer.report
    report.warnings.append("not enough tokens")
    out = save(model, tmp_path / "out", report=report, evaluation={"text": "a text", "perplexity": None})
    stored = json.loads((out / "quantization_report.json").read_text())
    assert stored["evaluation"]["text"] == "a text"
    assert stored["compression"]["warnings"] == ["not enough tokens"]


def test_a_full_directory_is_refused_unless_overwritten(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is not empty.*--overwrite"):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", overwrite=True)
    assert "stale.safetensors" not in names(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    save(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        save(model, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        save(model, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == {"out"}


def test_an_uncompressed_model_is_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(LRQError, match=r"this LlamaForCausalLM is not compressed. Call hf_lrq.compress"):
        save(AutoModelForCausalLM.from_pretrained(original), tmp_path / "out")
    assert names(tmp_path) == set()


def test_save_pretrained_brings_the_papers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert set(PAPERS) <= names(tmp_path)


def test_somebodys_own_card_stays(model: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my notes")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my notes"
    assert (tmp_path / "quantization_report.json").is_file()


def test_our_own_card_is_replaced(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("stale")
    model.save_pretrained(tmp_path)
    assert "stale" not in (tmp_path / "README.md").read_text()


def test_a_loaded_model_passes_its_papers_on(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    for folder in (tmp_path / "plain", save(model, tmp_path / "staged")):
        model.save_pretrained(folder)
        for name in PAPERS:
            assert (folder / name).read_bytes() == (compressed / name).read_bytes()


def test_an_evaluation_is_not_dropped_in_silence(compressed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with pytest.raises(LRQError, match="no report that an evaluation could be added to"):
        save(model, tmp_path / "out", evaluation={"perplexity": None})
    assert not (tmp_path / "out").exists()


def test_other_processes_write_no_papers(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not names(tmp_path) & set(PAPERS)


def test_push_uploads_weights_and_papers(model: Any, hub: list[dict[str, Any]]) -> None:
    assert model.push_to_hub("me/model", tags=["mine"], private=True, max_shard_size="20KB") == "https://hub/commit"
    (upload,) = hub
    assert upload["repo_id"] == "me/model"
    assert {"config.json", "model.safetensors.index.json", *PAPERS} <= upload["files"].keys()
    card = ModelCard(upload["files"]["README.md"].decode())
    assert {"hf_lrq", "mine"} <= set(card.data.tags)


def test_save_pretrained_pushes_what_it_saved(model: Any, hub: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / ".env").write_text("SECRET=1")
    model.save_pretrained(tmp_path / "name", push_to_hub=True, commit_message="first")
    (upload,) = hub
    assert ".env" not in upload["files"]
    assert (upload["repo_id"], upload["commit_message"]) == ("name", "first")
    assert upload["files"]["README.md"] == (tmp_path / "name" / "README.md").read_bytes()


def test_a_dequantized_model_saves_like_any_other(model: Any) -> None:
    assert "save_pretrained" in vars(model)
    model.dequantize()
    assert "save_pretrained" not in vars(model)
    assert "push_to_hub" not in vars(model)


def test_signatures_are_those_of_transformers(model: Any) -> None:
    assert model.save_pretrained.__doc__ == transformers.PreTrainedModel.save_pretrained.__doc__
    assert model.save_pretrained.__self__ is model


def test_trainer_checkpoints_hold_the_papers(model: Any, tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=os.fspath(tmp_path), report_to=[], use_cpu=True)
    transformers.Trainer(model, arguments).save_model(os.fspath(tmp_path / "checkpoint"))
    assert {*PAPERS, "model.safetensors"} <= names(tmp_path / "checkpoint")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").model.layers[0].mlp.up_proj.dense(),
        model.model.layers[0].mlp.up_proj.dense(),
    )


def test_a_single_file_of_an_earlier_save_is_not_counted(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    report = json.loads((tmp_path / "quantization_report.json").read_text())
    shards = tmp_path.glob("model-*.safetensors")
    assert report["size"]["file_bytes"] == sum(shard.stat().st_size for shard in shards)
