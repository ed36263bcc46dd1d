"""`hf-lrq serve` by vLLM: requests at the same time get what they get one after the other."""

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

openai = pytest.importorskip("openai")  # vLLM brings it.

ROOT = Path(__file__).resolve().parents[2]
REQUESTS, CLIENTS = 64, 8
WORDS = ("def ", "import ", "class ", "for x in ", "return ", "if not ", "self.", "with open(")
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small language model of the repository, compressed."""
    path = tmp_path_factory.mktemp("served")
    config = hf_lrq.LRQConfig(iters=1, refinements=0, sweeps=0, rounding="nearest", modules_to_not_convert=["layers.0"])
    source = ROOT / "examples" / "tiny_lm" / "model"
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="float32")
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a server of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_lrq.cli", "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    command += ["--engine", "vllm", "--", "--max-model-len", "256", "--max-num-seqs", str(CLIENTS)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **VARIABLES}, stdout=log, stderr=log)
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health", folder / "log.txt")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(process: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(1800):
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-6000:])


def test_requests_at_the_same_time_are_answered_as_one_after_the_other(server: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", timeout=600)

    def completion(prompt: str) -> str:
        answer = client.completions.create(model=str(folder), prompt=prompt, max_tokens=12, temperature=0)
        return answer.choices[0].text

    prompts = [f"{WORDS[number % len(WORDS)]}name_{number}" for number in range(REQUESTS)]
    serial = [completion(prompt) for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as clients:
        parallel = list(clients.map(completion, prompts))
    assert parallel == serial
    assert len(set(serial)) > 1


def test_a_stream_is_the_answer_in_pieces(server: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", timeout=600)
    asked = {"model": str(folder), "prompt": "def ", "max_tokens": 12, "temperature": 0}
    pieces = [each.choices[0].text for each in client.completions.create(stream=True, **asked)]
    assert len(pieces) > 1
    assert "".join(pieces) == client.completions.create(**asked).choices[0].text
