"""The commands, one after the other, on a tiny model: what they write and what they print."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_lrq import LRQConfig
from hf_lrq.calibration.batches import make_batches
from hf_lrq.cli import self_test
from hf_lrq.cli.measuring import bundled_text
from hf_lrq.kernels import cpu
from hf_lrq.kernels.cpu.library import Loader
from hf_lrq.nn import LRQHead, LRQLinear

DATA_FREE = ("--rank", "4", "--iters", "1", "--dataset", "none", "--device", "cpu")


def report_of(folder: Path) -> dict:
    return json.loads((folder / "quantization_report.json").read_text(encoding="utf-8"))


# --- quantize


def test_quantize_writes_a_model_that_loads(compressed: Path) -> None:
    assert {path.name for path in compressed.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "quantization_report.json",
        "tokenizer.json",
    }
    model = AutoModelForCausalLM.from_pretrained(compressed)
    layers = [module for module in model.modules() if isinstance(module, LRQLinear)]
    assert len(layers) == 15
    assert all(layer.rank == 4 for layer in layers if not isinstance(layer, LRQHead))


def test_quantize_reports_what_it_did(compressed: Path) -> None:
    report = report_of(compressed)
    assert report["base_model"] == {"name": "tiny-llama", "hub_id": None, "license": "mit"}
    assert report["architecture"] == "LlamaForCausalLM"
    assert (report["recipe"]["rank"], report["recipe"]["iters"], report["recipe"]["dataset"]) == (4, 1, "lines.txt")
    assert len(report["compression"]["layers"]) == 14 + 2
    assert report["compression"]["calibration"]["tokens"] == 8 * 64
    assert report["size"]["file_bytes"] == (compressed / "model.safetensors").stat().st_size
    assert report["size"]["predicted_bytes"] == pytest.approx(report["size"]["file_bytes"], rel=0.01)
    assert report["bits"]["whole_file"] == pytest.approx(
        8 * report["size"]["file_bytes"] / report["size"]["parameters"]
    )
    comparison = report["evaluation"]["comparison"]
    assert 0 < comparison["kl"]["mean"] < 1
    assert comparison["original"]["tokens"] > 1000
    card = (compressed / "README.md").read_text(encoding="utf-8")
    assert f"{comparison['kl']['mean']:.4g} ± " in card
    assert "lines.txt; " in card
    assert "license: mit" in card


def test_quantize_prints_a_table_and_how_to_load(cli, original: Path, text: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "new" / "out", tmp_path / "log.jsonl"
    result = cli(
        "quantize", original, "-o", out, *DATA_FREE, "--eval-text", text, "--window", 32, "--stride", 31,
        "--skip", "layers.1", "--rank-pattern", "up_proj=2", "--bits-pattern", "q_proj=4", "--jsonl", log,
        "--embedding-bits", 16,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = report_of(out)
    for figure in (
        f"{report['bits']['compressed_layers']:.3f}",
        f"{report['bits']['whole_file']:.3f}",
        f"{report['evaluation']['perplexity']['perplexity']:.4f}",
        f"{report['evaluation']['comparison']['kl']['mean']:.4g} ±",
        "window 32, stride 31",
        "from transformers import AutoModelForCausalLM",
        f"AutoModelForCausalLM.from_pretrained('{out}')",
    ):
        assert figure in result.stdout
    assert "7 matrices with 30,720 of 94,784 parameters" in result.stderr
    left = report["compression"]["left_parameters"]
    assert sum(left.values()) == 94_784 - 30_720
    assert f"left alone, {left['embeddings'] / 94_784:.2%}: embeddings\n" in result.stderr
    assert f"left alone, {left['output embeddings'] / 94_784:.2%}: output embeddings (lm_head)\n" in result.stderr
    assert f"Expected: {report['bits']['compressed_layers']:.3f} bits per weight" in result.stderr
    layers = {layer["name"].rpartition(".")[2]: layer for layer in report["compression"]["layers"]}
    assert len(layers) == 7
    assert (layers["up_proj"]["rank"], layers["gate_proj"]["rank"]) == (2, 4)
    assert (layers["q_proj"]["codebook"], layers["k_proj"]["codebook"]) == ("e8p4", "e8p2")
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["start", *["layer"] * 7, "end"]


def test_a_file_of_a_given_size(cli, original: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = (
        "--target-size",
        "80kB",
        "--embedding-bits",
        "auto",
        "--iters",
        "1",
        "--dataset",
        text,
        "--nsamples",
        "8",
        "--seqlen",
        "64",
    )
    result = cli("quantize", original, "-o", out, *given, "--no-eval", "--device", "cpu", "--codebook", "e8p")
    assert result.exit_code == 0, result.output
    assert "Expected: at most" in result.output
    assert "KL predicted for this budget" in result.output
    assert 70_000 < (out / "model.safetensors").stat().st_size <= 80_000
    assert report_of(out)["recipe"]["embedding_bits"] == "auto"
    assert report_of(out)["bits"]["embeddings"] < 16


def test_equal_seeds_give_equal_bytes(cli, original: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = cli("quantize", original, "-o", tmp_path / name, *DATA_FREE, "--no-eval", "--seed", seed)
        assert result.exit_code == 0, result.output
        assert "not measured" in result.stdout
    bytes_of = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"]
    assert bytes_of["a"] != bytes_of["c"]
    assert report_of(tmp_path / "a")["evaluation"] is None


def test_overwrite_replaces_a_model(cli, original: Path, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("quantize", original, "-o", out, *DATA_FREE, "--no-eval").exit_code == 0
    (out / "stale.txt").write_text("old")
    arguments = (*DATA_FREE, "--no-eval", "--codebook", "int", "--bits", 4, "--overwrite")
    result = cli("quantize", original, "-o", out, *arguments)
    assert result.exit_code == 0, result.output
    assert not (out / "stale.txt").exists()
    assert report_of(out)["compression"]["layers"][1]["codebook"] == "int4"


def test_a_model_without_perplexity_is_evaluated_by_its_outputs(cli, encoder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", encoder, "-o", out, *DATA_FREE, "--bits", 4, "--eval-text", text)
    assert result.exit_code == 0, result.output
    assert "relative error of the last hidden state" in result.stdout
    outputs = report_of(out)["evaluation"]["outputs"]
    assert 0 < outputs["relative_error"] < 0.5
    assert outputs["positions"] == 16 * 64
    result = cli("eval", out, "--against", encoder, "--text", text, "--json", "--device", "cpu")
    assert json.loads(result.stdout)["outputs"] == outputs
    modules = json.loads(cli("inspect", out, "--json").stdout)["modules"]
    assert {(module["codebook"], module["rank"]) for module in modules} == {("e8p4", 4), ("bt4", 4), ("int8", 0)}


def test_a_model_without_a_tokenizer_is_compressed_but_not_evaluated(cli, original: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((original / name).read_bytes())
    result = cli("quantize", bare, "-o", tmp_path / "out", *DATA_FREE)
    assert result.exit_code == 0, result.output
    assert "Not evaluated: " in result.stderr
    message = cli.fails("quantize", bare, "-o", tmp_path / "other", "--device", "cpu", "--dataset", "bundled")
    assert "has no tokenizer that can be loaded" in message


def test_the_bundled_text_is_calibrated_on_or_evaluated_on_but_not_both() -> None:
    calibration, held_out = bundled_text()
    seen = make_batches("bundled", lambda text, **_: {"input_ids": [*text.encode()]}, nsamples=1, seqlen=10**6)
    assert seen[0][0].tolist() == [*calibration.encode()]
    assert 0.05 < len(held_out) / len(calibration) < 0.15
    assert calibration.endswith("\n\n")
    paragraphs = {part for part in held_out.split("\n\n") if len(part) > 80}
    assert paragraphs.isdisjoint(calibration.split("\n\n"))


def test_no_data_is_the_default_and_that_is_said(cli, original: Path, tmp_path: Path) -> None:
    arguments = (
        "quantize",
        original,
        "-o",
        tmp_path / "out",
        "--rank",
        4,
        "--iters",
        1,
        "--device",
        "cpu",
        "--no-eval",
    )
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    said = "Compressing without data, as there is no --dataset. --dataset bundled gives much better models."
    assert said in result.stderr.replace("\n", " ")
    assert report_of(tmp_path / "out")["recipe"]["dataset"] is None
    asked = cli(*arguments, "--overwrite", "--dataset", "none")
    assert asked.exit_code == 0, asked.output
    assert "Compressing without data" not in asked.stderr


def test_the_bundled_text_is_calibrated_on_and_evaluated_on(cli, original: Path, tmp_path: Path) -> None:
    sizes = ("--dataset", "bundled", "--nsamples", 4, "--seqlen", 32, "--window", 128, "--stride", 127)
    result = cli("quantize", original, "-o", tmp_path / "out", "--rank", 4, "--iters", 1, "--device", "cpu", *sizes)
    assert result.exit_code == 0, result.output
    report = report_of(tmp_path / "out")
    assert report["recipe"]["dataset"] == "bundled"
    assert report["compression"]["calibration"]["tokens"] == 4 * 32
    assert report["evaluation"]["text"] == "held-out end of the bundled text"
    assert report["evaluation"]["perplexity"]["tokens"] == 8191


# --- inspect


def test_inspect_counts_what_is_in_the_files(cli, compressed: Path) -> None:
    found = json.loads(cli("inspect", compressed, "--json").stdout)
    report = report_of(compressed)
    assert found["compressed"]
    assert found["bits"] == pytest.approx(report["bits"])
    assert found["size"] == report["size"]
    assert found["tensor_parallel"] == [1]  # Rows of 64 are rotated as one block.
    assert found["quantization_config"] == json.loads((compressed / "config.json").read_text())["quantization_config"]
    by_name = {module["name"]: module for module in found["modules"]}
    assert list(by_name) == sorted(by_name)
    for layer in report["compression"]["layers"]:
        module = by_name[layer["name"]]
        assert [module["out_features"], module["in_features"]] == layer["shape"]
        # How factors would be stored is not in files that have none.
        for name in ("codebook", "rank", *(["factor_bits"] if layer["rank"] else []), "bits_per_weight", "bytes"):
            assert module[name] == layer[name], name
    tensors = load_file(compressed / "model.safetensors")
    stored = [t for name, t in tensors.items() if name.startswith("model.layers.0.mlp.up_proj.")]
    assert by_name["model.layers.0.mlp.up_proj"]["bytes"] == sum(t.numel() * t.itemsize for t in stored)


def test_inspect_prints_tables(cli, compressed: Path) -> None:
    result = cli("inspect", compressed)
    report = report_of(compressed)
    assert result.exit_code == 0, result.output
    assert "model.layers.1.self_attn.q_proj" in result.stdout
    assert "64 × 96" in result.stdout
    assert f"everything stored: {report['bits']['compressed_layers']:.3f}" in result.stdout
    assert f"whole file: {report['bits']['whole_file']:.3f}" in result.stdout
    assert f"codes and factors only: {report['bits']['caldera']:.3f}" in result.stdout
    assert "every matrix can be cut for: 1\n" in result.stdout


def test_inspect_reads_stacks_of_experts_with_a_rank_of_their_own(cli, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(tmp_path / "original")
    options = LRQConfig(bits=2, codebook="e8p", rank=6, rank_pattern={"experts.down_proj": 3}, iters=1, sweeps=0)
    model = MixtralForCausalLM.from_pretrained(tmp_path / "original", quantization_config=options)
    model.save_pretrained(tmp_path / "compressed")
    result = cli("inspect", tmp_path / "compressed", "--json")
    assert result.exit_code == 0, result.output
    modules = {module["name"].rpartition(".")[2]: module for module in json.loads(result.stdout)["modules"]}
    down, gate_up = modules["qstack_down_proj"], modules["qstack_gate_up_proj"]
    assert (down["experts"], down["rank"], down["out_features"], down["in_features"]) == (2, 3, 64, 96)
    assert (gate_up["experts"], gate_up["rank"], gate_up["codebook"]) == (2, 6, "e8p2")


def test_inspect_of_an_uncompressed_model_says_so(cli, original: Path) -> None:
    result = cli("inspect", original)
    assert result.exit_code == 0, result.output
    assert "This model is not compressed." in result.stdout
    found = json.loads(cli("inspect", original, "--json").stdout)
    assert not found["compressed"]
    assert found["modules"] == []
    assert found["bits"]["compressed_layers"] is None
    assert found["size"]["linears"]["bits_per_weight"] == 32


def test_inspect_knows_other_formats_by_name(cli, original: Path, tmp_path: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (tmp_path / "model.safetensors").write_bytes((original / "model.safetensors").read_bytes())
    assert "compressed by gptq, not by hf_lrq" in cli("inspect", tmp_path).stdout


# --- eval


def test_eval_repeats_the_figures_of_the_report(cli, compressed: Path, original: Path, text: Path) -> None:
    result = cli("eval", compressed, "--against", original, "--text", text, "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    found, report = json.loads(result.stdout), report_of(compressed)
    assert found["size"] == report["size"]
    for name, figure in report["evaluation"]["comparison"].items():
        assert found["comparison"][name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name


def test_eval_of_one_model_prints_its_perplexity(cli, original: Path, text: Path) -> None:
    result = cli("eval", original, "--text", text, "--window", 64, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "KL" not in result.stdout
    assert "window 64, stride 32" in result.stdout


def test_eval_takes_as_many_tokens_as_asked(cli, original: Path, text: Path) -> None:
    result = cli("eval", original, "--text", text, "--window", 32, "--eval-tokens", 80, "--device", "cpu", "--json")
    assert json.loads(result.stdout)["perplexity"]["tokens"] == 79


# --- doctor


def test_doctor_finds_a_working_installation(cli) -> None:
    state = torch.get_rng_state()
    result = cli("doctor", "--json")
    found = json.loads(result.stdout)
    assert found["healthy"], result.stdout
    assert result.exit_code == 0
    names = [check["name"] for check in found["checks"]]
    assert names[:3] == ["python", "torch", "transformers"]
    assert {"peft", "triton", "device cpu", "compression on cpu", "registration", "save and load"} <= set(names)
    assert "bitsandbytes kernels" in names
    assert torch.equal(torch.get_rng_state(), state)


def test_doctor_fails_where_results_would_be_wrong(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "LARGEST_DIFFERENCE", 0.0)
    monkeypatch.setattr(self_test, "AUTO_QUANTIZER_MAPPING", {})
    result = cli("doctor")
    assert result.exit_code == 1
    lines = {line.split("  ")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("FAIL")}
    assert set(lines) == {"compression on cpu", "registration"}
    assert "a layer is" in lines["compression on cpu"]
    assert "Something is wrong" in result.stdout


def test_doctor_names_old_and_missing_libraries(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.5.1+cu124", "transformers": "5.10.0", "peft": "0.9.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("hf_lrq.cli.doctor.version", version)
    found = json.loads(cli("doctor", "--json").stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert not found["healthy"]
    assert checks["torch"] == {
        "name": "torch",
        "status": "FAIL",
        "detail": "2.5.1+cu124 is too old (needed): pip install -U 'torch>=2.6'",
    }
    assert checks["transformers"]["status"] == "ok"
    assert checks["peft"]["status"] == "warn"
    assert checks["safetensors"]["status"] == "FAIL"
    assert "pip install 'safetensors>=0.4.3'" in checks["safetensors"]["detail"]
    assert checks["triton"]["status"] == "ok"


def test_doctor_warns_where_layers_are_computed_by_torch_alone(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lrq.cli.self_test.has_backend", lambda device: False)
    result = cli("doctor", "--json")
    assert result.exit_code == 0
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["device cpu"]["status"] == "warn"
    assert "layers run by:" in checks["device cpu"]["detail"]


def test_doctor_tells_which_kernels_run_or_why_none_do(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> dict[str, str]:
        checks = json.loads(cli("doctor", "--json").stdout)["checks"]
        return next(check for check in checks if check["name"] == "CPU kernels")

    found = check()
    monkeypatch.setenv("HF_LRQ_CPU_KERNELS", "0")
    monkeypatch.setattr(cpu, "_loader", Loader(lambda _: None))
    assert check() == {"name": "CPU kernels", "status": "warn", "detail": "off: HF_LRQ_CPU_KERNELS is 0"}
    if not found["detail"].startswith("off: "):
        assert found["status"] == "ok"
        assert ".so (sha256 " in found["detail"]
