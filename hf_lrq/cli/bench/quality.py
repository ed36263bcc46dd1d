"""`hf-lrq bench quality`: what compression by this library and by others costs in predictions, at their true sizes."""

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import make_batches
from hf_lrq.cli.arguments import QualityOptions
from hf_lrq.cli.bench.candidates import Candidate, Compressed, Material, in_file
from hf_lrq.cli.bench.peers import obstacles, peers_named
from hf_lrq.cli.bench.plot import check_plot, plot
from hf_lrq.cli.bench.recipes import recipes
from hf_lrq.cli.bench.records import OnText, Record, Row
from hf_lrq.cli.bench.tables import markdown, show
from hf_lrq.cli.loading import chosen_device, load_model, load_tokenizer, read_text, set_threads, tokenize
from hf_lrq.cli.output import hush, if_interrupted, print_json, say
from hf_lrq.errors import SpecError
from hf_lrq.evaluation import Size, compare_windows
from hf_lrq.report import installed_versions
from hf_lrq.report.text import public_name

REMEMBERED = 1 << 32  # Bytes of the original's logits that are kept; what is beyond is computed for each candidate.


def run(options: QualityOptions) -> None:
    """The command."""
    hush(options.quiet)
    if options.plot is not None:
        check_plot()
    for path in (options.out, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise SpecError(f"{path} cannot be written: its folder does not exist.")
    earlier = None if options.add is None else Record.read(options.add)
    if options.recipes or options.peers:
        found = _measured(options, earlier)
    elif earlier is None:
        raise SpecError(
            "nothing to compare. Give at least one --recipe or --peer, or the file of an earlier run as --add."
        )
    else:
        found = earlier
    if options.plot is not None:
        plot(found, options.plot)
    if options.as_json:
        print_json(found.to_dict())
    elif options.markdown:
        print(markdown(found))
    else:
        show(found)


def _measured(options: QualityOptions, earlier: Record | None) -> Record:
    """The earlier rows and those asked for; the file is written anew after each."""
    ours, peers = recipes(options.recipes, options.seed), peers_named(options.peers)
    if options.calibration is None or not options.texts:
        raise SpecError("give the calibration text, --calibration FILE, and held-out texts, --text NAME=FILE.")
    files = dict(map(_named, options.texts))
    texts = {name: read_text(path) for name, path in files.items()}
    read_text(options.calibration)
    set_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    material = _material(options, tokenizer)
    tokens = {name: _cut(tokenize(tokenizer, text), options) for name, text in texts.items()}
    shared = _shared(options, material, files, tokens)
    record = Record(shared) if earlier is None else earlier
    record.check_same(shared)
    record = record.without(obstacles(peers, material))
    candidates = [*ours, *(peer for peer in peers if peer.name not in record.not_run)]
    reference = Remembering(material.original)
    out = options.out or options.add
    with if_interrupted("Nothing was written." if out is None else f"Finished rows are in {out}."):
        for number, candidate in enumerate(candidates, 1):
            say(f"{number} of {len(candidates)}: {candidate.name}")
            record = record.with_row(measure(candidate, material, reference, tokens, options.window))
            if out is not None:
                record.write(out)
    return record


def measure(
    candidate: Candidate, material: Material, reference: nn.Module, tokens: Mapping[str, Tensor], window: int
) -> Row:
    """Compress a copy of the original, and compare it with the original on every text.

    Args:
        candidate: how.
        material: what from.
        reference: gives the original's logits.
        tokens: name of a text -> [n] ids.
        window: tokens seen at a time; windows do not overlap but for one token.
    """
    model = copy.deepcopy(material.original)
    threads = torch.get_num_threads()
    before = candidate.prepare(material)
    start = time.perf_counter()
    found = candidate.compress(model, material)
    seconds = before + time.perf_counter() - start
    torch.set_num_threads(threads)  # Some libraries set it.
    texts = {
        name: OnText.of(compare_windows(model, reference, ids, window, window - 1)) for name, ids in tokens.items()
    }
    return _row(candidate, found, seconds, threads, texts)


def _row(candidate: Candidate, found: Compressed, seconds: float, threads: int, texts: dict[str, OnText]) -> Row:
    size = found.size
    assert size.bits_per_weight is not None, "something was compressed"
    assert size.bits_per_parameter is not None, "there are parameters"
    return Row(
        name=candidate.name,
        by=candidate.by,
        bits_per_weight=size.bits_per_weight,
        bits_per_parameter=size.bits_per_parameter,
        bytes=size.total_bytes,
        seconds=seconds,
        threads=threads,
        size=size.to_dict(),
        details=dict(found.details),
        versions={**installed_versions(), **{name: version(name) for name in candidate.libraries()}},
        texts=texts,
    )


class Remembering(nn.Module):
    """A model whose logits are kept, as many as there is room for: each candidate asks for the same ones."""

    def __init__(self, model: Any, room: int = REMEMBERED):
        super().__init__()
        self.model, self.room = model, room
        self.config = model.config
        self._kept: dict[bytes, Tensor] = {}

    def get_input_embeddings(self) -> nn.Module:
        """Of the model."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def forward(self, ids: Tensor) -> SimpleNamespace:
        """Logits of [1, n] ids."""
        key = ids.cpu().numpy().tobytes()
        if key not in self._kept:
            logits = self.model(ids).logits
            if logits.nbytes > self.room:
                return SimpleNamespace(logits=logits)
            self.room -= logits.nbytes
            self._kept[key] = logits
        return SimpleNamespace(logits=self._kept[key])


def _material(options: QualityOptions, tokenizer: Any) -> Material:
    stored = options.stored.value
    say(f"Loading {options.model}")
    # Rounded to what files hold: the uncompressed part of a compressed model is then exactly the original's.
    original = load_model(options.model, stored, chosen_device(options.device)).float()
    batches = make_batches(
        options.calibration, tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seed
    )
    ids = [batch for batch in batches if isinstance(batch, Tensor)]
    return Material(original, ids, tokenizer, getattr(torch, stored), options.seed, options.ggml)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise SpecError(f"--text takes NAME=FILE, for example wiki=wiki.txt; got {text!r}.")
    return name, Path(path)


def _cut(tokens: Tensor, options: QualityOptions) -> Tensor:
    """As many tokens as fill the windows, each of which shares one with the one before."""
    return tokens[: options.windows * (options.window - 1) + 1]


def _shared(
    options: QualityOptions, material: Material, files: Mapping[str, Path], tokens: Mapping[str, Tensor]
) -> dict[str, Any]:
    size = Size.of(in_file(material.original, material.stored))
    calibration = torch.cat([batch.flatten() for batch in material.batches])
    assert options.calibration is not None, "checked before"
    return {
        "original": {
            "name": public_name(options.model)[0],
            "digest": _digest(p.detach().to(material.stored) for p in material.original.parameters()),
            "stored": str(material.stored).removeprefix("torch."),
            "parameters": size.tensors.weights,
            "bytes": size.total_bytes,
            "bits_per_parameter": size.bits_per_parameter,
        },
        "calibration": {
            "text": options.calibration.name,
            "tokens": len(calibration),
            "sequences": sum(map(len, material.batches)),
            "digest": _digest([calibration]),
        },
        "window": options.window,
        "seed": options.seed,
        "texts": {
            name: {"text": files[name].name, "tokens": len(ids) - 1, "digest": _digest([ids])}
            for name, ids in tokens.items()
        },
    }


def _digest(tensors: Iterator[Tensor] | list[Tensor]) -> str:
    """64 bits of SHA-256 over the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
