"""`hf-lrq serve`: a compressed model behind OpenAI's interface, by the best engine that is installed."""

import errno
import json
import shlex
import socket
from ipaddress import ip_address
from pathlib import Path

from hf_lrq.checkpoint import header_of
from hf_lrq.cli.arguments import ServeOptions
from hf_lrq.cli.engines import chosen
from hf_lrq.cli.inspection import inspect_directory
from hf_lrq.cli.loading import load_config, load_tokenizer
from hf_lrq.cli.output import WARNING, hush, say
from hf_lrq.errors import LRQError, SpecError


def run(options: ServeOptions) -> None:
    """The command."""
    hush(False)
    engine, why = chosen(options.engine)
    arguments = engine.arguments(options)
    check_compressed(options.model)
    local = check_address(options.host, options.port)
    say(f"Engine: {engine.name} ({why})")
    chats = load_tokenizer(options.model).chat_template is not None
    if not chats:
        say("The model has no chat template: /v1/completions will work, /v1/chat/completions will not.", WARNING)
    if not local:
        say(f"{options.host} can be reached by other machines, and no request has to show a password.", WARNING)
    address = base_url(options)
    say(f"Once the model is loaded, clients find it as {options.model!r} at {address}, for example:", "green")
    say(example(address, options.model, chats))
    engine.start(arguments, options)


def check_compressed(model: str) -> None:
    """Look at a model as loading does; of one on the Hub, at its config alone.

    Raises:
        LRQError: if it is not there, is damaged, or is not compressed by this library.
    """
    config = load_config(model)
    header = inspect_directory(Path(model)).header if Path(model).is_dir() else header_of(config.to_dict())
    if header is None:
        raise LRQError(
            f"{model} is not compressed by hf_lrq. Compress it first: hf-lrq quantize {model} -o my-model; or serve it "
            "as it is by the engine's own command: transformers serve, vllm serve."
        )


def check_address(host: str, port: int) -> bool:
    """Whether only this machine can reach an address, which must be free.

    Raises:
        SpecError: if it is none of this machine.
        LRQError: if the port is taken or may not be.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise SpecError(f"There is no address {host!r}. Give --host 127.0.0.1, or one of this machine.") from None
    faults = [fault for family, *_, place in found if (fault := _fault(family, place)) is not None]
    if any(fault.errno == errno.EADDRINUSE for fault in faults):
        raise LRQError(f"Port {port} of {host} is taken by another process. Choose another one: --port {port + 1}")
    # One of the addresses of a name will do, as where there is no IPv6.
    if len(faults) == len(found):
        raise SpecError(f"Cannot listen at port {port} of {host}: {faults[0].strerror}. Give another --host or --port.")
    return all(ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in found)


def base_url(options: ServeOptions) -> str:
    """What clients take as base URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # All addresses are no address.
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}/v1"


def example(address: str, model: str, chats: bool) -> str:
    """A request, to be pasted into a shell."""
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello"}
    body = json.dumps({"model": model, **asked, "max_tokens": 64})
    where = f"{address}/chat/completions" if chats else f"{address}/completions"
    return f"curl {shlex.quote(where)} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _fault(family: int, place: tuple[object, ...]) -> OSError | None:
    """Why nothing can listen there, or None."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do, or connections that have just ended would count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error
    return None
