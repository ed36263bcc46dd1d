"""vLLM: checkpoints of this library as one of its quantization methods, found by an entry point."""


def register() -> None:
    """Make `quant_method: "hf_lrq"` known to vLLM, which calls this in each of its processes, perhaps several times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from hf_lrq.checkpoint import QUANT_METHOD
    from hf_lrq.integrations.vllm.config import LRQVllmConfig

    register_quantization_config(QUANT_METHOD)(LRQVllmConfig)
