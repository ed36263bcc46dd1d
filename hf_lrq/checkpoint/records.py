"""What the files of a checkpoint record of themselves, against what they hold and what config.json says."""

import mmap
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from hf_lrq.checkpoint.format import SHOWN_OFFENDERS, QuantizationHeader
from hf_lrq.digests import Record, fingerprint, record_of, tensor_digest
from hf_lrq.errors import CheckpointError
from hf_lrq.safetensors_headers import FileHeader

READERS = 4  # Threads; more wait for the disk.
_ANOTHER_COPY = "Download or copy the checkpoint again."


def check_record(header: QuantizationHeader, files: Sequence[FileHeader]) -> Record | None:
    """Compare what the files record with config.json and with the names of the tensors in them; no tensor is read.

    Returns:
        The record, None where the files have none, as those of releases that wrote none.

    Raises:
        CheckpointError: if config.json was changed, if tensors were removed or added, or if the files are of different
            checkpoints.
    """
    records = {each.file: record_of(each.metadata, each.file) for each in files}
    known = [record for record in records.values() if record is not None]
    if not known:
        return None
    record, now = known[0], fingerprint(header.to_dict())
    if any(other != record for other in known):
        raise CheckpointError(
            f"{', '.join(sorted(file.name for file in records))} are not of one checkpoint: what they record differs. "
            f"{_ANOTHER_COPY}"
        )
    if record.header != now:
        raise CheckpointError(
            f"quantization_config in config.json is not what it was when the model was saved: its fingerprint is "
            f"{now[:16]}, the files were saved with {record.header[:16]}. {_ANOTHER_COPY} To change how a model is "
            "compressed, compress the original again."
        )
    _check_names(record, [each for each in files if records[each.file] is not None], files)
    return record


def _check_names(record: Record, recorded: Iterable[FileHeader], files: Iterable[FileHeader]) -> None:
    present = {name for each in files for name in each.tensors}
    faults = [f"{name}: missing" for name, digest in record.digests.items() if digest and name not in present]
    if record.complete:
        own = [name for each in recorded for name in each.tensors]
        faults += [f"{name}: not there when the model was saved" for name in own if name not in record.digests]
    if faults:
        raise CheckpointError(f"{len(faults)} tensors were removed or added:\n{listing(faults)}\n{_ANOTHER_COPY}")


def verify_tensors(record: Record | None, files: Sequence[FileHeader]) -> tuple[str, ...]:
    """Compare all tensors with their digests; reads the files as a whole.

    Args:
        record: from `check_record`.
        files: of the checkpoint.

    Returns:
        Names of the tensors that have no digest: saving could not tell what they would be called.

    Raises:
        CheckpointError: naming the first tensors that differ, or if there is no record.
    """
    if record is None:
        names = ", ".join(each.file.name for each in files)
        raise CheckpointError(
            f"{names}: no digests of the tensors are recorded, so they cannot be verified. The files are those of an "
            "earlier release or of another program; load the model and save it again to record them."
        )
    found = {name: digest for each in files for name, digest in digests_of(each).items()}
    changed = [name for name, digest in found.items() if record.digests.get(name) not in (None, digest)]
    if changed:
        faults = [f"{name}: recorded {record.digests[name]}, found {found[name]}" for name in changed]
        raise CheckpointError(
            f"{len(changed)} tensors are not what they were when the model was saved:\n{listing(faults)}\n"
            f"{_ANOTHER_COPY}"
        )
    return tuple(name for name in found if record.digests.get(name) is None)


def digests_of(header: FileHeader) -> Mapping[str, str]:
    """Name -> digest of every tensor of a file."""
    if not header.tensors:
        return {}
    with (
        header.file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        ThreadPoolExecutor(READERS) as readers,
    ):
        return dict(
            zip(
                header.tensors,
                readers.map(
                    lambda span: tensor_digest(span.dtype, span.shape, view[span.start : span.stop]),
                    header.tensors.values(),
                ),
                strict=True,
            )
        )


def listing(faults: Sequence[str]) -> str:
    """The first of them, one a line, and how many more there are."""
    more = len(faults) - SHOWN_OFFENDERS
    return "\n".join(f"  {line}" for line in [*faults[:SHOWN_OFFENDERS], *([f"and {more} more"] if more > 0 else [])])
