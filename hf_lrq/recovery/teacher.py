"""What the original model says about a batch: asked on the spot, on any device, or recorded on disk beforehand."""

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.errors import RecoveryError
from hf_lrq.evaluation.windows import device_of

CHUNK = 1 << 24  # How many logits are turned to float32 at a time: 64 MiB.


@dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher says about the n positions of a batch, padding left out; None where it has no such output.

    Attributes:
        log_probs: [n, k] float32, log-probabilities of its k most likely tokens.
        tokens: [n, k] int64, the ids of these tokens.
        hidden: [n, width] float, its last hidden states.
    """

    log_probs: Tensor | None
    tokens: Tensor | None
    hidden: Tensor | None

    def to(self, device: torch.device) -> "Targets":
        """The same targets on a device."""
        moved = {item.name: getattr(self, item.name) for item in fields(self)}
        return Targets(**{name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()})


class Teacher(Protocol):
    """Anything that has targets for a batch."""

    def targets(self, batch: Batch) -> Targets:
        """What the teacher says about a batch; on any device."""


@dataclass(frozen=True, eq=False)
class LiveTeacher:
    """A model that is asked for every batch anew.

    Attributes:
        model: the model, in evaluation mode; on any device.
        top_k: logits to keep.
    """

    model: nn.Module
    top_k: int

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """What the model says about a batch; on its device."""
        logits, hidden = outputs_of(self.model, batch)
        log_probs = tokens = None
        if logits is not None:
            log_probs, tokens = top_log_probs(logits, self.top_k)
        return Targets(log_probs, tokens, hidden)


@dataclass(frozen=True)
class RecordedTeacher:
    """What `record_teacher` wrote.

    Attributes:
        folder: where there is a file for each batch, found by the batch's content.
    """

    folder: Path

    def targets(self, batch: Batch) -> Targets:
        """What was recorded for a batch; on the CPU.

        Raises:
            RecoveryError: if this batch was not recorded.
        """
        path = self.folder / file_of(batch)
        if not path.is_file():
            raise RecoveryError(
                f"{self.folder} holds no outputs of the teacher for a batch of {tokens_of(batch)} tokens. Record it "
                "with record_teacher from the same batches: same texts, lengths and batch size."
            )
        tensors = load_file(path)
        tokens = tensors.get("tokens")
        return Targets(tensors.get("log_probs"), None if tokens is None else tokens.long(), tensors.get("hidden"))


def record_teacher(
    teacher: nn.Module, batches: Iterable[Batch], folder: str | os.PathLike[str], top_k: int = 64
) -> RecordedTeacher:
    """Run a teacher over batches and write its outputs to disk, so that it need not be in memory later.

    A token takes 8 top_k bytes and its last hidden state in float16: 8.7 kB for 4096 channels and 64 logits. Batches
    that are recorded already are passed over, so an interrupted recording goes on.

    Args:
        teacher: the original model, on any device.
        batches: see `calibration.batches.Batch`.
        folder: where to write; made if it does not exist.
        top_k: logits to keep for each position.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    live = LiveTeacher(teacher.eval(), top_k)
    for batch in batches:
        path = target / file_of(batch)
        if path.is_file():
            continue
        found = live.targets(batch)
        tensors = {"log_probs": found.log_probs, "tokens": found.tokens, "hidden": found.hidden}
        small = {"tokens": torch.int32, "hidden": torch.float16}
        stored = {
            name: tensor.to("cpu", small.get(name, torch.float32)).contiguous()
            for name, tensor in tensors.items()
            if tensor is not None
        }
        staged = path.with_suffix(".part")
        save_file(stored, staged)
        os.replace(staged, path)
    return RecordedTeacher(target)


def as_teacher(teacher: "nn.Module | str | os.PathLike[str] | Teacher", top_k: int) -> Teacher:
    """The teacher for a model, for the folder of a recording, or for something that is a teacher already.

    Raises:
        RecoveryError: if it is none of these.
    """
    if isinstance(teacher, nn.Module):
        return LiveTeacher(teacher, top_k)
    if isinstance(teacher, str | os.PathLike):
        if not Path(teacher).is_dir():
            raise RecoveryError(f"There is no folder {teacher} with recorded outputs of a teacher.")
        return RecordedTeacher(Path(teacher))
    if not hasattr(teacher, "targets"):
        raise RecoveryError(f"A teacher is a model or the folder of a recording, got {type(teacher).__name__}.")
    return teacher


def outputs_of(model: nn.Module, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Logits [n, vocabulary] and last hidden states [n, width] of the n positions that are not padding.

    Raises:
        RecoveryError: if the model has neither.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    inputs.pop("labels", None)
    device = device_of(model)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    returned: Any = model(**moved, output_hidden_states=True, use_cache=False)
    logits, states = getattr(returned, "logits", None), getattr(returned, "hidden_states", None)
    hidden = states[-1] if states else getattr(returned, "last_hidden_state", None)
    if logits is None and hidden is None:
        raise RecoveryError(f"{type(model).__name__} returns neither logits nor hidden states.")
    mask = moved.get("attention_mask")
    kept = [None if x is None or x.ndim < 3 else rows(x, mask) for x in (logits, hidden)]
    return kept[0], kept[1]


def rows(output: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [n, width] of an output [batch, length, width] that are not padding."""
    return output.flatten(0, -2) if mask is None or mask.ndim != 2 else output[mask.bool()]


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, k] float32 and ids [n, k] of the k most likely tokens; logits [n, vocabulary]."""
    k = min(k, logits.shape[-1])
    parts = []
    for some in logits.split(max(1, CHUNK // logits.shape[-1])):
        some = some.float()
        values, tokens = some.topk(k)
        parts.append((values - some.logsumexp(-1, keepdim=True), tokens))
    return torch.cat([values for values, _ in parts]), torch.cat([tokens for _, tokens in parts])


def file_of(batch: Batch) -> str:
    """Name of the file for a batch: equal for equal tensors of the same names."""
    named: Mapping[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    checksum = 0
    for name in sorted(named):
        if isinstance(named[name], Tensor):
            tensor = named[name].detach().cpu().contiguous()
            checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
            checksum = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes(), checksum)
    return f"targets-{checksum:08x}.safetensors"


def tokens_of(batch: Batch) -> int:
    """Number of tokens in a batch, padding left out."""
    if isinstance(batch, Tensor):
        return batch.numel()
    mask = batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) else int(batch["input_ids"].numel())
