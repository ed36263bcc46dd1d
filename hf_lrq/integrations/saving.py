"""Writing a compressed model: everything or nothing, with its report and its card."""

import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from transformers import PreTrainedModel

from hf_lrq.checkpoint import (
    QUANT_METHOD,
    clear_disk_errors,
    header_of,
    read_config,
    read_headers,
    staged_directory,
)
from hf_lrq.errors import LRQError
from hf_lrq.evaluation import Evaluation, Size, size_of_headers
from hf_lrq.integrations.provenance import Provenance
from hf_lrq.nn import COMPRESSED, LRQExpertStack
from hf_lrq.report import REPORT_NAME, base_card, build_report, write_report
from hf_lrq.safetensors_headers import sort_metadata

CARD_NAME = "README.md"
LARGEST_PASSED_ON = 100_000_000  # Bytes of a report or card of somebody else.


def save(
    model: Any,
    out: str | os.PathLike[str],
    tokenizer: Any = None,
    overwrite: bool = False,
    report: Any = None,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> Path:
    """Save a compressed model with its tokenizer, report and card; an interruption leaves nothing half-written.

    Args:
        model: compressed.
        out: directory; made if it does not exist.
        tokenizer: or processor, or `Companions`: its `save_pretrained` is called before that of the model.
        overwrite: replace a directory that holds a model.
        report: of the compression; None takes the one that the model carries.
        evaluation: of the compressed model, for report and card.
        base_model: id or path of the original; None takes the one that the model remembers.

    Returns:
        The directory.

    Raises:
        CheckpointError: if `out` is taken.
        LRQError: if the model is not compressed.
    """
    origin = _provenance_of(model)
    if report is not None:
        origin.report = report
    if evaluation is not None:
        if origin.report is None:
            raise LRQError(
                "this model was loaded compressed and has no report that an evaluation could be added to. Save it "
                "without evaluation=, or pass report= as well."
            )
        origin.evaluation = evaluation
    if base_model is not None:
        origin.base_model = base_model
    with staged_directory(out, overwrite) as staging:
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _write(model, staging)
        write_report_and_card(model, staging, ask_hub=True)
    return Path(out)


def write_report_and_card(model: Any, directory: Path, ask_hub: bool = False) -> None:
    """Write `quantization_report.json` and `README.md` beside the saved weights.

    A model that was loaded compressed has no report of its own: it passes on the files it came with.

    Args:
        ask_hub: fetch the metadata of the original's card from the Hub if it is not at hand.
    """
    origin = _provenance_of(model)
    if origin.report is None:
        _pass_on(origin.source, directory)
        return
    document = build_report(
        origin.report,
        recipe={name: value for name, value in origin.recipe.items() if name != "seed"},
        seed=origin.recipe["seed"],
        evaluation=origin.evaluation,
        size=_size_of(directory),
        base_model=origin.base_model,
        base_file=origin.base_file,
        base_card=_card_of(origin.base_model, ask_hub),
        architecture=type(model).__name__,
        method=origin.method,
        recovery=origin.recovery,
        before_recovery=origin.before_recovery,
    )
    card = directory / CARD_NAME
    # Without a report beside it, the card is somebody's own: it stays.
    own = card.read_bytes() if card.is_file() and not (directory / REPORT_NAME).is_file() else None
    write_report(directory, document)
    if own is not None:
        card.write_bytes(own)


def bind_saving(model: Any) -> None:
    """Make `save_pretrained` and `push_to_hub` of this model write its report and card, and `num_parameters` count.

    On the instance, as the class belongs to transformers; a deep copy of the model gets methods of its own.
    """
    model.save_pretrained = MethodType(save_pretrained, model)
    model.push_to_hub = MethodType(push_with_report_and_card, model)
    model.num_parameters = MethodType(num_parameters, model)


def unbind_saving(model: Any) -> None:
    """Undo `bind_saving`."""
    for name in ("save_pretrained", "push_to_hub", "num_parameters"):
        model.__dict__.pop(name, None)


@functools.wraps(PreTrainedModel.save_pretrained)
def save_pretrained(
    model: Any, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    names = ("repo_id", "commit_message", "private", "create_pr")
    to_hub = {name: kwargs.pop(name) for name in names if name in kwargs}
    directory = Path(save_directory)
    with clear_disk_errors(directory):
        _write(model, directory, *args, **kwargs)
    # An adapter, or a process that is not the main one, writes no weights of the model.
    if not kwargs.get("is_main_process", True) or getattr(model, "_hf_peft_config_loaded", False):
        return
    write_report_and_card(model, directory, ask_hub=push_to_hub)
    if push_to_hub:
        # Not the directory itself: there may be more in it than the model.
        to_hub |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        push_with_report_and_card(model, to_hub.pop("repo_id", directory.name), **to_hub)


@functools.wraps(PreTrainedModel.num_parameters)
def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    stored = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    # What can be trained is what there is: factors, not the weights that they stand for.
    return stored if only_trainable else stored + sum(_not_stored(module) for module in model.modules())


@functools.wraps(PreTrainedModel.push_to_hub)
def push_with_report_and_card(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    options: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    if getattr(model, "_hf_peft_config_loaded", False):
        return str(type(model).push_to_hub(model, repo_id, max_shard_size=max_shard_size, tags=tags, **options))
    with tempfile.TemporaryDirectory() as folder:
        with clear_disk_errors(folder):
            _write(model, Path(folder), max_shard_size=max_shard_size)
        write_report_and_card(model, Path(folder), ask_hub=True)
        return _upload(Path(folder), repo_id, tags=tags, **options)


def _write(model: Any, directory: Path, *args: Any, **options: Any) -> None:
    """`save_pretrained` of transformers; equal models give equal files."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.original_names = options.get("save_original_format", True)
    type(model).save_pretrained(model, directory, *args, **options)
    if options.get("is_main_process", True):
        for file in _weight_files(directory):
            sort_metadata(file)


def _upload(
    folder: Path,
    repo_id: str,
    tags: list[str] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    **commit: Any,
) -> str:
    """Upload a saved model as it is: the push of transformers would write a card of its own over ours."""
    if tags:
        card = ModelCard.load(folder / CARD_NAME)
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
        card.save(folder / CARD_NAME)
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    return str(
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message=commit_message or "Upload model", **commit
        )
    )


def _not_stored(module: Any) -> int:
    """Weights that a compressed module stands for, less the numbers that it keeps for them."""
    if not isinstance(module, COMPRESSED) or getattr(module, "shares", False):
        return 0
    experts = module.experts if isinstance(module, LRQExpertStack) else 1
    kept = (getattr(module, name) for name in module.layout.tensors(module.out_features, module.in_features))
    numbers = sum(tensor.numel() for tensor in kept if tensor is not None)  # Factors can be elsewhere, in training.
    return experts * module.out_features * module.in_features - numbers


def _provenance_of(model: Any) -> Provenance:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != QUANT_METHOD:
        raise LRQError(
            f"this {type(model).__name__} is not compressed. Call hf_lrq.compress(model), or load it with "
            "from_pretrained(..., quantization_config=LRQConfig())."
        )
    provenance: Provenance = quantizer.provenance
    return provenance


def _size_of(directory: Path) -> Size | None:
    """Measured; None where no weights were written."""
    files, header = _weight_files(directory), header_of(read_config(directory))
    if not files or header is None:
        return None
    return size_of_headers(read_headers(files), sum(file.stat().st_size for file in files), header)


def _weight_files(directory: Path) -> list[Path]:
    """Files of the model just saved: transformers removes the shards of an earlier one, but not its single file."""
    shards = sorted(directory.glob("model*-of-*.safetensors"))
    return shards or sorted(directory.glob("model*.safetensors"))


def _card_of(base_model: str | None, ask_hub: bool) -> dict[str, Any]:
    """Metadata of the original's card; without `ask_hub` only what is on this machine."""
    if not base_model:
        return {}
    if ask_hub or Path(base_model).is_dir():
        return base_card(base_model)
    try:
        cached = try_to_load_from_cache(base_model, CARD_NAME)
    except ValueError:  # Not an id.
        return {}
    return base_card(str(Path(cached).parent)) if isinstance(cached, str) else {}


def _pass_on(source: Path | None, directory: Path) -> None:
    for name in (REPORT_NAME, CARD_NAME):
        found = source / name if source is not None else None
        if found is None or not found.is_file() or (directory / name).exists():
            continue
        if found.stat().st_size <= LARGEST_PASSED_ON:
            shutil.copyfile(found, directory / name)
