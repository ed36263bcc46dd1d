"""The report is JSON that round-trips, and the model card says what the report says and nothing else."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_lrq.evaluation import Comparison, Estimate, Evaluation, OutputDistance, Part, Perplexity, Size
from hf_lrq.report import base_card, build_report, model_card, report_text, write_report
from hf_lrq.work.records import CompressionReport, LayerRecord

RECIPE = {"bits": 2, "rank": 4, "dataset": "bundled", "rank_pattern": {"q_proj|k_proj": 8}, "bits_pattern": None}


def layer(index: int, **changes: Any) -> LayerRecord:
    values = {
        "name": f"model.layers.{index}.mlp.up_proj",
        "kind": "linear",
        "shape": (64, 32),
        "codebook": "e8p2",
        "bits": 2,
        "rank": 4,
        "factor_bits": 16,
        "relative_error": 0.1 + 0.01 * index,
        "trace": (0.3, 0.2),
        "bits_per_weight": 5.0,
        "bytes": 64 * 32 * 5 // 8,
        "damping": 0.01,
        "steps": (),
        "n_tokens": 4096,
        "seconds": 0.5,
    }
    return LayerRecord(**{**values, **changes})


@pytest.fixture
def compression() -> CompressionReport:
    return CompressionReport(
        layers=[layer(index) for index in range(12)],
        skipped={"lm_head": "output embeddings", **{f"layers.{i}.gate": "router" for i in range(7)}},
        total_parameters=50_000,
        compressed_parameters=12 * 64 * 32,
        warnings=["block 3: <script>alert(1)</script> | [a](b) *and* `c`"],
        seconds=6.0,
        calibration={"method": "sequential", "sequences": 8, "tokens": 4096},
    )


@pytest.fixture
def evaluation() -> Evaluation:
    nats = Perplexity(Estimate(math.log(12.5), 0.01), 999, 64, 32)
    original = dataclasses.replace(nats, nats=Estimate(math.log(10.0), 0.01))
    comparison = Comparison(
        compressed=nats,
        original=original,
        nats_rise=Estimate(math.log(1.25), 0.002),
        kl=Estimate(0.125, 0.003),
        reverse_kl=Estimate(0.25, None),
        top1_agreement=Estimate(0.9, 0.01),
        top5_agreement=Estimate(0.8, 0.01),
    )
    size = Size(Part(24576, 15360), Part(), Part(25000, 50000), Part(424, 848), Part(), 2000, 68_208)
    return Evaluation(size=size, perplexity=nats, comparison=comparison, text="held-out text", seconds=1.5)


def built(compression: CompressionReport, **changes: Any) -> dict[str, Any]:
    arguments = {"recipe": RECIPE, "seed": 7, "base_model": "org/Tiny-1B", "architecture": "LlamaForCausalLM"}
    return build_report(compression, **{**arguments, **changes})


# --- the report


def test_report_round_trips_through_json(compression: CompressionReport, evaluation: Evaluation) -> None:
    report = built(compression, evaluation=evaluation)
    again = json.loads(report_text(report))
    assert again == report
    assert CompressionReport.from_dict(again["compression"]) == compression


def test_report_has_these_fields(compression: CompressionReport, evaluation: Evaluation) -> None:
    report = built(compression, evaluation=evaluation)
    assert list(report) == [
        "report_version",
        "base_model",
        "architecture",
        "recipe",
        "seed",
        "versions",
        "bits",
        "size",
        "evaluation",
        "compression",
    ]
    assert report["report_version"] == 1
    assert report["seed"] == 7
    assert report["bits"]["compressed_layers"] == 5.0
    assert report["bits"]["whole_file"] == pytest.approx(8 * 68_208 / 50_000)
    assert report["bits"]["caldera"] == pytest.approx(2 + 16 * 4 * (64 + 32) / (64 * 32))
    assert report["size"]["compressed"]["weights"] == 24576
    assert report["evaluation"]["comparison"]["kl"] == {"mean": 0.125, "standard_error": 0.003}
    assert {"hf_lrq", "python", "torch", "transformers"} <= report["versions"].keys()


def test_what_was_not_measured_is_null(compression: CompressionReport) -> None:
    report = built(compression, base_model=None)
    assert report["evaluation"] is None
    assert report["size"] is None
    assert report["bits"]["whole_file"] is None
    assert report["base_model"] is None


def test_numbers_that_json_has_not_are_null(compression: CompressionReport) -> None:
    compression.layers[0] = layer(0, relative_error=math.nan, trace=(math.inf, 0.5))
    text = report_text(built(compression))
    first = json.loads(text)["compression"]["layers"][0]
    assert first["relative_error"] is None
    assert first["trace"] == [None, 0.5]
    assert "NaN" not in text
    assert "Infinity" not in text
    model_card(built(compression))


@pytest.mark.parametrize(
    ("base_model", "name", "hub_id"),
    [
        ("org/Tiny-1B", "org/Tiny-1B", "org/Tiny-1B"),
        ("gpt2", "gpt2", "gpt2"),
        ("/secret/user/models/tiny/", "tiny", None),
        ("./models/tiny", "tiny", None),
        ("~/tiny", "tiny", None),
        (r"C:\Users\someone\tiny", "tiny", None),
        ("/secret/hub/models--org--Tiny-1B/snapshots/0a1b2c", "org/Tiny-1B", "org/Tiny-1B"),
    ],
)
def test_local_paths_do_not_leak(
    compression: CompressionReport, base_model: str, name: str, hub_id: str | None, tmp_path: Path
) -> None:
    report = built(compression, base_model=base_model, recipe={"dataset": "/secret/user/corpus.txt"})
    assert report["base_model"] == {"name": name, "hub_id": hub_id}
    assert report["recipe"]["dataset"] == "corpus.txt"
    write_report(tmp_path, report)
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "secret" not in text
        assert "someone" not in text


def test_an_existing_relative_folder_is_no_hub_id(
    compression: CompressionReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "org"):
        assert built(compression, base_model=name)["base_model"] == {"name": name.split("/")[-1], "hub_id": None}


def test_files_are_replaced_and_nothing_else_is_left(compression: CompressionReport, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("old")
    write_report(tmp_path, built(compression))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "quantization_report.json"]
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    write_report(tmp_path, json.loads((tmp_path / "quantization_report.json").read_text(encoding="utf-8")))
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


# --- the card


def loaded_card(tmp_path: Path, report: dict[str, Any]) -> ModelCard:
    write_report(tmp_path, report)
    return ModelCard.load(tmp_path / "README.md")


def test_card_metadata(compression: CompressionReport, tmp_path: Path) -> None:
    card = {"license": "other", "license_name": "tiny", "license_link": "LICENSE.md", "language": ["en"], "tags": ["x"]}
    data = loaded_card(tmp_path, built(compression, base_card=card)).data.to_dict()
    assert data == {
        "base_model": "org/Tiny-1B",
        "base_model_relation": "quantized",
        "language": ["en"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://huggingface.co/org/Tiny-1B/blob/main/LICENSE.md",
        "pipeline_tag": "text-generation",
        "tags": ["hf_lrq", "quantized", "low-rank", "2-bit"],
    }


def test_card_of_a_local_model_names_no_base(compression: CompressionReport, tmp_path: Path) -> None:
    data = loaded_card(tmp_path, built(compression, base_model="/secret/tiny")).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "license" not in data


def test_card_says_what_was_measured(compression: CompressionReport, evaluation: Evaluation, tmp_path: Path) -> None:
    text = loaded_card(tmp_path, built(compression, evaluation=evaluation)).content
    for line in (
        "# Tiny-1B in 5.00 bits per weight",
        'AutoModelForCausalLM.from_pretrained("THIS_REPOSITORY")',
        "| compressed layers: codes with padding, scales, rotations, factors | 5.000 |",
        "| whole file, embeddings and everything else included | 10.913 |",
        "| compressed layers as the CALDERA paper counts: codes and factors only | 5.000 |",
        "| whole file | 50,000 | 68.21 kB | 10.913 |",
        "| perplexity | 10 | 12.5 |",
        "| rise of ln perplexity, nats per token |  | 0.2231 ± 0.002 |",
        "| KL(original, compressed), nats per token |  | 0.125 ± 0.003 |",
        "| KL(compressed, original), nats per token |  | 0.25 |",
        "| same most likely token |  | 90.00% ± 1.00% |",
        "Text: held-out text; 999 tokens scored, window 64, stride 32.",
        "Calibrated on 8 sequences, 4,096 tokens of bundled.",
        "| `rank_pattern` | `q_proj\\|k_proj: 8` |",
        "| `seed` | `7` |",
        "12 matrices were compressed. Relative error of their outputs, on the calibration inputs: "
        "median 0.1550, largest 0.2100.",
        "| output embeddings | 1 | `lm_head` |",
        "| router | 7 | `layers.0.gate`, `layers.1.gate`, `layers.2.gate`, `layers.3.gate`, `layers.4.gate`, … |",
    ):
        assert line in text
    assert "bits_pattern" not in text
    assert "not measured" not in text.split("## Limitations")[0]


def test_card_lists_the_worst_layers_first(compression: CompressionReport) -> None:
    text = model_card(built(compression)).content
    rows = [line for line in text.splitlines() if line.startswith("| `model.layers.")]
    assert [row.split("`")[1] for row in rows] == [f"model.layers.{index}.mlp.up_proj" for index in range(11, 1, -1)]


def test_card_admits_what_was_not_measured(compression: CompressionReport) -> None:
    text = model_card(built(compression)).content
    assert "| perplexity | not measured | not measured |" in text
    assert "| KL(original, compressed), nats per token |  | not measured |" in text
    assert "| whole file, embeddings and everything else included | not measured |" in text
    assert "Nothing was measured when this card was made" in text


def test_card_of_a_model_without_perplexity_shows_the_output_error(
    compression: CompressionReport, evaluation: Evaluation
) -> None:
    outputs = OutputDistance(relative_error=0.0625, cosine=0.998, positions=128, output="last_hidden_state")
    measured = dataclasses.replace(evaluation, perplexity=None, comparison=None, outputs=outputs)
    text = model_card(built(compression, evaluation=measured, architecture="BertModel")).content
    assert "| relative error of the last hidden state | 0 | 0.0625 |" in text
    assert "held-out text; 128 positions" in text
    assert "perplexity |" not in text
    assert "from transformers import AutoModel\n" in text


def test_card_of_a_data_free_run_says_so(compression: CompressionReport) -> None:
    compression.layers = [layer(0, n_tokens=0)]
    recipe = {"dataset": None, "rank": 4, "nsamples": 128, "seqlen": 2048, "dequantize": False}
    text = model_card(built(compression, recipe=recipe)).content
    assert "Compressed without calibration data" in text
    assert "| `rank` | `4` |" in text
    assert not any(f"`{name}`" in text for name in ("nsamples", "seqlen", "dequantize")), "they had no effect"
    assert "Relative error of their weights: median 0.1000" in text


def test_card_says_by_what_errors_were_weighed(compression: CompressionReport) -> None:
    compression.layers = [layer(0, output_shrinkage=0.25), layer(1)]
    text = model_card(built(compression)).content
    assert "outputs, on the calibration inputs, weighed by what they do to the predictions: median 0.1050" in text


def test_card_says_which_ranks_were_chosen(compression: CompressionReport) -> None:
    compression.layers = [layer(0, rank=7), layer(1, rank=16), layer(2, rank=8)]
    assert "| `rank` | `7 to 16, by the size of each matrix` |" in str(
        model_card(built(compression, recipe={"rank": None}))
    )
    assert "by the size" not in str(model_card(built(compression, recipe={"bits": 2})))


def test_card_says_what_a_budget_became(compression: CompressionReport) -> None:
    compression.layers = [layer(0, bits=2), layer(1, bits=4, rank=0)]
    compression.budget = {"predicted_loss": 0.1}
    card = str(model_card(built(compression, recipe={"avg_bits": 2.7, "bits": 2, "rank": 4})))
    assert "| `avg_bits` | `2.7` |" in card
    assert "| `bits` | `2 to 4, by what each matrix was predicted to lose` |" in card
    assert "| `rank` | `4` |" in card


def test_card_of_a_recovered_model_says_so(compression: CompressionReport) -> None:
    recovery = {"tokens": 118784, "before": {"divergence": 0.0625}, "after": {"divergence": 0.03125}}
    report = built(compression)
    card = str(model_card({**report, "recovery": {**recovery, "stopped": "all steps"}}))
    assert "Then trained on 118,784 tokens of the original's outputs" in card
    assert "from 0.0625 to 0.03125 nats per token" in card
    assert "Then trained" not in str(model_card({**report, "recovery": {**recovery, "stopped": "no gain"}}))


def test_card_lists_the_shares_of_what_is_not_compressed(compression: CompressionReport) -> None:
    assert "Weights that are not compressed" not in str(model_card(built(compression)))
    compression.left_parameters = {"embeddings": 25_000, "Gate.weight: odd <b>": 300, "norms": 20, "biases": 4}
    card = str(model_card(built(compression)))
    rows = ["| embeddings | 50.00% |", "| Gate.weight: odd &lt;b&gt; | 0.60% |", "| norms, biases | 0.05% |"]
    assert [line for line in card.splitlines() if line in rows] == rows


def test_foreign_text_is_literal(compression: CompressionReport, evaluation: Evaluation, tmp_path: Path) -> None:
    compression.skipped = {"a`|`b\n---\n": "be|cause <img src=x>"}
    compression.layers[0] = layer(0, name="x`| y", relative_error=1.0)
    measured = dataclasses.replace(evaluation, text="---\n# text {{ 7 * 7 }} <b>")
    report = built(
        compression,
        evaluation=measured,
        recipe={"dataset": "`code` | {% raw %}"},
        architecture="os.system('x')",
        base_model="a](b) <i>",
    )
    card = loaded_card(tmp_path, report)
    text = card.content
    for markup in ("<script>", "<img", "<b>", "<i>", "49", "a](b)", "os.system"):
        assert markup not in text
    assert r"block 3: &lt;script&gt;alert(1)&lt;/script&gt; \| \[a\](b) \*and\* \`c\`" in text
    assert r"\# text {{ 7 \* 7 }} &lt;b&gt;" in text
    assert r"| `dataset` | `'code' \| {% raw %}` |" in text
    assert r"| `x'\| y` |" in text
    assert r"| be\|cause &lt;img src=x&gt; | 1 | `a'\|'b ---` |" in text
    assert set(card.data.to_dict()) == {"library_name", "tags"}


def test_base_card_is_read_from_the_folder(tmp_path: Path) -> None:
    assert base_card(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# x\n")
    assert base_card(str(tmp_path)) == {"license": "mit", "language": "en"}
    (tmp_path / "README.md").write_text("---\n{not yaml: [\n---\n")
    assert base_card(str(tmp_path)) == {}


def test_base_card_of_an_unreachable_model_is_empty() -> None:
    assert base_card("nobody/no-such-model") == {}
