"""A compressed checkpoint in vLLM gives the tokens that transformers gives; what is incomplete is refused."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MOE = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
# What differs from kind to kind, and what is compressed in other ways than the rest.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, tied table of codes": ("llama", {"tie_word_embeddings": True}, {"embedding_bits": 8}),
    "llama, one of three matrices plain": (
        "llama",
        {},
        {"modules_to_not_convert": ["k_proj"], "bits_pattern": {"v_proj": 4}, "factor_bits": 4},
    ),
    "qwen2, biases, two tables of codes": ("qwen2", {"tie_word_embeddings": False}, {"embedding_bits": 6}),
    "phi3, fused on disk": ("phi3", {}, {}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16}, {}),
    "mixtral, whose class takes no table of codes": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"codebook": "int", "bits": 4, "embedding_bits": 16},
    ),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 32}, {}),
}


# Embeddings, heads, linear layers and experts, each at least once; compiling takes longer than all else.
COMPILED = (
    "llama, tied table of codes",
    "qwen2, biases, two tables of codes",
    "mixtral, whose class takes no table of codes",
)


@pytest.fixture(scope="module")
def models(compressed, greedy, tmp_path_factory):
    """Kind -> the folder of a model, and what transformers gives."""
    root = tmp_path_factory.mktemp("models")
    folders = {kind: root / str(number) for number, kind in enumerate(KINDS)}
    return {
        kind: (folder, greedy(compressed(folder, *KINDS[kind][:2], **KINDS[kind][2])))
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def served(models, in_vllm):
    """Kind -> what vLLM gives; all in one process, as starting one takes longest."""
    return dict(zip(models, in_vllm(*({"model": folder} for folder, _ in models.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, models, served):
    assert served[kind] == models[kind][1]


def test_compiled_they_are_the_same(models, in_vllm):
    """By vLLM's own defaults: one graph for any number of tokens."""
    tasks = ({"model": models[kind][0], "options": {"enforce_eager": False}} for kind in COMPILED)
    assert in_vllm(*tasks) == [models[kind][1] for kind in COMPILED]


def test_lora_of_peft_on_top(compressed, in_vllm, greedy, tmp_path):
    model = compressed(tmp_path / "model", "llama", {"tie_word_embeddings": True}, embedding_bits=8)
    alone = greedy(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    options = {"enable_lora": True, "max_lora_rank": 8, "additional_config": {"hf_lrq": {"backend": "torch"}}}
    found = in_vllm({"model": tmp_path / "model", "lora": str(tmp_path / "adapter"), "options": options})
    assert found == [greedy(adapted)]
    assert found != [alone]


def test_two_processes_give_the_same(compressed, in_vllm, greedy, tmp_path):
    """Attention, experts and both tables are cut."""
    shape = {**MOE, "head_dim": 32, "tie_word_embeddings": False}
    model = compressed(tmp_path, "qwen3_moe", shape, tensor_parallel=2, codebook="e8p", embedding_bits=8)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    # vLLM binds a process to each of several NUMA nodes, unless it is told not to.
    found = in_vllm({"model": tmp_path, "options": options}, VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert found == [greedy(model)]


def change(folder: Path, *lost: str, recorded: bool = True) -> Path:
    """Take tensors out of a saved model, and perhaps the record of them."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() if recorded else {"format": "pt"}
    save_file({name: t for name, t in load_file(file).items() if not name.startswith(lost)}, file, metadata=metadata)
    return folder


UP = "model.layers.1.mlp.up_proj."
# What is taken out -> what the error says.
LACKING = {
    "a tensor": ((f"{UP}lr_L",), True, f"{UP}lr_L: missing"),
    "a tensor that no record lists": ((f"{UP}lr_L",), False, f"{UP}lr_L: expected"),
    "a matrix that no record lists": ((UP,), False, f"the checkpoint lacks {UP}weight"),
    "all": (("model.", "lm_head."), False, "no file holds the scales"),
}


def test_what_is_incomplete_is_refused_with_its_name(compressed, in_vllm, tmp_path):
    for number, (lost, recorded, _) in enumerate(LACKING.values()):
        compressed(tmp_path / str(number), "llama")
        change(tmp_path / str(number), *lost, recorded=recorded)
    found = in_vllm(*({"model": tmp_path / str(number)} for number in range(len(LACKING))))
    for (_, _, message), told in zip(LACKING.values(), found, strict=True):
        assert isinstance(told, str)
        assert message in told


def test_without_the_plugin_a_checkpoint_is_refused(compressed, in_vllm, tmp_path):
    compressed(tmp_path, "llama")
    (told,) = in_vllm({"model": tmp_path}, VLLM_PLUGINS="none")
    assert "hf_lrq" in told
    assert "nknown quantization method" in told


def test_options_are_checked_when_the_engine_starts(compressed, in_vllm, tmp_path):
    compressed(tmp_path, "llama")
    (told,) = in_vllm({"model": tmp_path, "options": {"additional_config": {"hf_lrq": {"activation": "int4"}}}})
    assert "activation must be one of" in told
