"""What files record of their content when they are written, so that an edit shows: one fingerprint, many digests.

Both are in the `__metadata__` of every file. They find accidents and edits by people who do not know of them; somebody
who writes them anew can put anything there.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_lrq.errors import CheckpointError

HEADER_KEY, DIGESTS_KEY = "hf_lrq_header", "hf_lrq_digests"
DIGITS = 16  # 64 bits: an accident that keeps them is out of the question.

Digests = Mapping[str, str | None]  # Name of a tensor -> its digest; None where the name in the files is not known.


@dataclass(frozen=True)
class Record:
    """What one file says about its checkpoint.

    Attributes:
        header: fingerprint of the quantization_config.
        digests: of all tensors of the checkpoint, also of those in other files.
    """

    header: str
    digests: Digests

    @property
    def complete(self) -> bool:
        """Whether every tensor has a digest, so that one without was not there when the files were written."""
        return None not in self.digests.values()

    def to_metadata(self) -> dict[str, str]:
        """For `__metadata__`; the inverse of `record_of`."""
        text = json.dumps(self.digests, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return {HEADER_KEY: self.header, DIGESTS_KEY: text}


def record_of(metadata: Mapping[str, str], where: object) -> Record | None:
    """The record of a file; None for files of releases that wrote none, and of other programs.

    Args:
        metadata: of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: if it is damaged.
    """
    if HEADER_KEY not in metadata and DIGESTS_KEY not in metadata:
        return None
    try:
        digests = json.loads(metadata[DIGESTS_KEY])
        valid = isinstance(digests, dict) and all(isinstance(value, str | None) for value in digests.values())
    except (KeyError, ValueError, RecursionError):
        valid = False
    if not valid or HEADER_KEY not in metadata:
        raise CheckpointError(f"what {where} records of its content cannot be read. Download or copy it again.")
    return Record(metadata[HEADER_KEY], digests)


def expected_record(names: Iterable[str]) -> Record:
    """A record as long as that of a checkpoint with these tensors."""
    return Record("0" * 64, dict.fromkeys(names, "0" * DIGITS))


def fingerprint(header: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a `quantization_config`."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_digest(dtype: str, shape: Iterable[int], data: bytes | memoryview) -> str:
    """The first digits of the SHA-256 of a tensor: its dtype as in safetensors, its shape and its bytes."""
    found = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    found.update(data)
    return found.hexdigest()[:DIGITS]
