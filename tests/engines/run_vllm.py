"""Runs saved models in vLLM, one after the other in this process, and prints what each gives as a line of JSON.

    python run_vllm.py '[{"model": "path", "prompts": [[1, 5]], "tokens": 8, "options": {"dtype": "float32"}}]'

A line is a list of tokens for each prompt, or the text of the error that stopped the engine.
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

BASE = {
    "dtype": "float32",
    "max_model_len": 128,
    "skip_tokenizer_init": True,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "enforce_eager": True,
}


def answers(task: dict) -> list[list[int]]:
    engine = LLM(model=task["model"], **{**BASE, **task.get("options", {})})
    asked = SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True, detokenize=False)
    adapter = LoRARequest("adapter", 1, task["lora"]) if task.get("lora") else None
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    found = engine.generate(prompts, asked, lora_request=adapter, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


def main(tasks: list[dict]) -> None:
    for task in tasks:
        try:
            line = json.dumps(answers(task))
        except Exception as error:
            line = json.dumps(f"{type(error).__name__}: {error}")
        print(line, flush=True)
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
