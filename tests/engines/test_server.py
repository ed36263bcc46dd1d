"""The server of vLLM on a compressed model: requests at the same time get what they get one after the other."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hf_lrq

ROOT = Path(__file__).resolve().parents[2]
REQUESTS, CLIENTS = 64, 8
WORDS = ("def ", "import ", "class ", "for x in ", "return ", "if not ", "self.", "with open(")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server with the small language model of the repository."""
    folder = tmp_path_factory.mktemp("served")
    config = hf_lrq.LRQConfig(iters=1, refinements=0, sweeps=0, rounding="nearest", modules_to_not_convert=["layers.0"])
    source = ROOT / "examples" / "tiny_lm" / "model"
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="float32")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` of CPU builds asks for a distribution called vllm, which they are not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", str(CLIENTS), "--enforce-eager"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(command, env={**env, "VLLM_NO_USAGE_STATS": "1"}, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address: str) -> None:
    for _ in range(1800):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(address)


def completion(address: str, prompt: str) -> str:
    asked = {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_requests_at_the_same_time_are_answered_as_one_after_the_other(server):
    wait_for(server)
    prompts = [f"{WORDS[number % len(WORDS)]}name_{number}" for number in range(REQUESTS)]
    serial = [completion(server, prompt) for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as clients:
        parallel = list(clients.map(lambda prompt: completion(server, prompt), prompts))
    assert parallel == serial
    assert len(set(serial)) > 1
