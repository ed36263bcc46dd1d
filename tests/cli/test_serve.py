"""`hf-lrq serve`: which engine is taken, how it is called, what is refused before, and a server with a client."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_lrq import LRQConfig, LRQError, SpecError
from hf_lrq.cli import engines, serve
from hf_lrq.cli.arguments import DType, EngineName, ServeOptions
from hf_lrq.cli.engines import VLLM, Engine, Transformers, chosen

MESSAGES = [{"role": "user", "content": "t5 t9"}]


class Sham(Engine):
    """An engine that serves nothing."""

    praise = "it is a sham"

    def __init__(self, name: str, reason: str | None = None):
        self.name = name  # type: ignore[misc]
        self.reason = reason
        self.started: list[list[str]] = []

    def missing(self) -> str | None:
        return self.reason

    def arguments(self, options: ServeOptions) -> list[str]:
        return [self.name, options.model]

    def start(self, arguments: Sequence[str], options: ServeOptions) -> None:
        self.started.append(list(arguments))


@pytest.fixture(scope="module")
def model(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, compressed, with a chat template and words that any text can be cut into."""
    folder = tmp_path_factory.mktemp("served") / "tiny-lrq"
    config = LRQConfig(rank=4, factor_bits=16, codebook="e8p", iters=1, rounding="nearest", sweeps=0, refinements=0)
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(folder)
    words = {f"t{n}": n for n in range(256)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="t0")
    fast.chat_template = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% endfor %}t1"
    fast.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- the engine


def test_auto_takes_the_first_that_can_serve_and_says_why_not_those_before() -> None:
    first, second = Sham("vllm"), Sham("transformers")
    assert chosen(EngineName.auto, (first, second)) == (first, "it is a sham")
    absent = Sham("vllm", "not there")
    assert chosen(EngineName.auto, (absent, second)) == (second, "it is a sham; vllm: not there")
    assert chosen(EngineName.transformers, (first, second)) == (second, "--engine names it")


def test_without_an_engine_every_reason_is_told() -> None:
    both = (Sham("vllm", "not there"), Sham("transformers", "neither"))
    with pytest.raises(LRQError, match=r"asked for:\n  vllm: not there\n  transformers: neither$"):
        chosen(EngineName.auto, both)
    with pytest.raises(LRQError, match=r"asked for:\n  vllm: not there$"):
        chosen(EngineName.vllm, both)


def test_what_an_engine_lacks_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name in ("vllm", "uvicorn") else object())
    assert str(VLLM().missing()).startswith("it is not installed. Run: pip install vllm")
    assert Transformers().missing() == 'its server needs uvicorn, not installed. Run: pip install "hf_lrq[serve]"'
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    assert Transformers().missing() is None


@pytest.mark.parametrize(("plugin", "found"), [("hf_lrq.integrations.vllm:register", True), ("other:register", False)])
def test_vllm_can_serve_where_it_finds_this_package(monkeypatch: pytest.MonkeyPatch, plugin: str, found: bool) -> None:
    entry = type("Entry", (), {"value": plugin})
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "entry_points", lambda group: [entry] if group == "vllm.general_plugins" else [])
    assert (VLLM().missing() is None) is found
    assert found or "finds no plugin of hf_lrq" in str(VLLM().missing())


# --- its command line


def test_vllm_is_called_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, argv: seen.append([path, *argv]))
    options = ServeOptions(model="m", port=8001, dtype=DType.float32, further=["--max-model-len", "64"])
    engine = VLLM()
    engine.start(engine.arguments(options), options)
    server = "-m vllm.entrypoints.openai.api_server --model m --host 127.0.0.1 --port 8001 --dtype float32"
    assert seen == [[sys.executable, sys.executable, *server.split(), "--max-model-len", "64"]]


@pytest.mark.parametrize(("name", "value"), [("device", "cpu"), ("threads", 2)])
def test_vllm_takes_neither_a_device_nor_threads(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"vllm has no --{name}.*--engine transformers"):
        VLLM().arguments(ServeOptions(model="m", **{name: value}))


def test_transformers_is_held_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServeOptions(model="m", host="::1", device="cpu", further=["--compile"])
    rest = "--model-timeout -1 --device cpu --host ::1 --port 8000 --dtype auto --compile"
    for takes, model in ((True, ["m"]), (False, ["--force-model", "m"])):
        monkeypatch.setattr(engines, "_takes_a_model", lambda takes=takes: takes)
        assert Transformers().arguments(options) == [*model, *rest.split()]


def test_transformers_is_started_with_the_threads_and_options_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def server(model: str, port: int = 0) -> None:
        seen.append((model, port))

    monkeypatch.setattr("transformers.cli.serve.Serve", server)
    monkeypatch.setattr(engines, "set_threads", seen.append)
    with pytest.raises(SystemExit) as end:
        Transformers().start(["m", "--port", "9"], ServeOptions(model="m", threads=3))
    assert (seen, end.value.code) == ([3, ("m", 9)], 0)


# --- the command


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Sham:
    """Stands in for the engines."""
    sham = Sham("sham")
    monkeypatch.setattr(serve, "chosen", lambda asked: (sham, "it is one"))
    return sham


def test_the_engine_is_started_after_address_and_example_are_told(cli: Any, engine: Sham, model: Path) -> None:
    port = free_port()
    result = cli("serve", model, "--port", port)
    assert result.exit_code == 0, result.output
    assert engine.started == [["sham", str(model)]]
    first, second, example = result.stderr.splitlines()
    assert first == "Engine: sham (it is one)"
    assert second.endswith(f"as {str(model)!r} at http://127.0.0.1:{port}/v1, for example:")
    command, url, *_, body = shlex.split(example)
    assert (command, url) == ("curl", f"http://127.0.0.1:{port}/v1/chat/completions")
    assert json.loads(body)["model"] == str(model)


def test_a_model_without_a_chat_template_and_a_host_for_others_are_warned_of(
    cli: Any, engine: Sham, model: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    port = free_port()
    result = cli("serve", plain, "--host", "0.0.0.0", "--port", port)
    assert "has no chat template: /v1/completions will work" in result.stderr
    assert "0.0.0.0 can be reached by other machines, and no request has to show a password." in result.stderr
    assert f"curl http://127.0.0.1:{port}/v1/completions " in result.stderr
    assert len(engine.started) == 1


def test_what_is_no_compressed_model_is_not_served(cli: Any, engine: Sham, original: Path, tmp_path: Path) -> None:
    assert cli.fails("serve", tmp_path) == f"{tmp_path} holds no config.json. Give the folder of a saved model."
    message = cli.fails("serve", original)
    assert message.startswith(f"{original} is not compressed by hf_lrq. Compress it first: hf-lrq quantize")
    assert engine.started == []


def test_a_model_that_would_not_load_is_not_served(cli: Any, engine: Sham, model: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in cli.fails("serve", cut)
    assert engine.started == []


def test_a_port_that_is_taken_is_refused(cli: Any, engine: Sham, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = cli.fails("serve", model, "--port", port)
    expected = f"Port {port} of 127.0.0.1 is taken by another process. Choose another one: --port {port + 1}"
    assert message == expected
    assert engine.started == []


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Cannot listen at port \d+ of 192\.0\.2\.1: .* Give another --host or --port"):
        serve.check_address("192.0.2.1", free_port())  # RFC 5737: of documentation, of no machine.
    assert serve.check_address("localhost", free_port())


def test_what_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"There is no address 'a\.\.b'"):
        serve.check_address("a..b", 8000)

    def unknown(*asked: object, **how: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(SpecError, match="There is no address 'elsewhere'"):
        serve.check_address("elsewhere", 8000)


def test_addresses_of_version_6_are_in_brackets() -> None:
    assert serve.base_url(ServeOptions(model="m", host="::", port=8)) == "http://[::1]:8/v1"


# --- a server and a client


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server of transformers with the model; stopped by Ctrl-C."""
    for name in Transformers.needs:
        pytest.importorskip(name)
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.txt"
    command = [sys.executable, "-m", "hf_lrq.cli", "serve", str(model), "--engine", "transformers", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--device", "cpu", "--threads", "1"], stdout=out, stderr=out)
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                    break
            except OSError:
                time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_the_client_of_openai_gets_what_the_model_says_in_whole_and_in_pieces(server: str, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.count("t") > 1

    import openai

    with openai.OpenAI(base_url=server, api_key="none") as client:
        asked: dict[str, Any] = {"model": str(model), "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        assert client.chat.completions.create(**asked).choices[0].message.content == expected
        pieces = [
            piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == expected
        assert len([piece for piece in pieces if piece]) > 1
