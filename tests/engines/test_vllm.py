"""A compressed checkpoint in vLLM gives the tokens that transformers gives; what is incomplete is refused."""

from typing import Any

import pytest

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
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"codebook": "int", "bits": 4}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 32}, {}),
}


@pytest.fixture(scope="module")
def both(compressed, in_vllm, greedy, tmp_path_factory):
    """Kind -> what vLLM gives, and what transformers gives; all in one process, as starting one takes longest."""
    root = tmp_path_factory.mktemp("models")
    folders = {kind: root / str(number) for number, kind in enumerate(KINDS)}
    told = {kind: greedy(compressed(folders[kind], *KINDS[kind][:2], **KINDS[kind][2])) for kind in KINDS}
    found = in_vllm(*({"model": folder} for folder in folders.values()))
    return {kind: (tokens, told[kind]) for kind, tokens in zip(KINDS, found, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, both):
    found, told = both[kind]
    assert found == told
