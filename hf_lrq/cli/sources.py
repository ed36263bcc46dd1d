"""Where `hf-lrq quantize` takes a model from: a saved one, or a GGUF file, whose blocks become ordinary weights."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoTokenizer

from hf_lrq.checkpoint import check_not_hidden
from hf_lrq.cli.loading import (
    check_folder,
    first_line,
    load_config,
    load_model,
    load_tokenizer,
    model_class,
    unavailable,
)
from hf_lrq.errors import LRQError
from hf_lrq.integrations.calibration_data import knows_words
from hf_lrq.integrations.companions import Companions, companions_of

ENDING = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"-\d+-of-(\d+)\.gguf$")


class Source(ABC):
    """A model that is to be compressed, not loaded yet."""

    name: str  # As its report calls it: folder, file, or id on the Hub.

    @abstractmethod
    def check(self) -> None:
        """Complain about what can be seen to be wrong at once.

        Raises:
            LRQError: naming it.
        """

    @abstractmethod
    def config(self) -> Any:
        """The model's config.

        Raises:
            LRQError: if it cannot be had.
        """

    @abstractmethod
    def model(self, dtype: str, device: torch.device) -> Any:
        """The model, in evaluation mode.

        Args:
            dtype: name of a torch dtype, or "auto".
            device: where to put it.

        Raises:
            LRQError: if it cannot be loaded.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            LRQError: if there is none.
        """

    @abstractmethod
    def companions(self, tokenizer: Any) -> Companions | None:
        """What is saved beside the weights; None where that is the tokenizer alone."""

    def file(self) -> str | None:
        """Which file of it, and what that holds, in words; None where it is all of it."""
        return None


@dataclass(frozen=True)
class Saved(Source):
    """A folder, or a repository on the Hub, as transformers saves it."""

    name: str

    def check(self) -> None:
        """A folder must hold a model."""
        check_folder(self.name)

    def config(self) -> Any:
        """From config.json."""
        return load_config(self.name)

    def model(self, dtype: str, device: torch.device) -> Any:
        """Of the class it was saved from."""
        return load_model(self.name, dtype, device)

    def tokenizer(self) -> Any:
        """Beside the model."""
        return load_tokenizer(self.name)

    def companions(self, tokenizer: Any) -> Companions:
        """Processors, templates and settings, too."""
        return companions_of(self.name, tokenizer)


@dataclass(frozen=True)
class Gguf(Source):
    """A GGUF file, read by transformers; what it rounded stays rounded.

    Attributes:
        place: folder, or id on the Hub.
        filename: in there.
        given: whether the file itself was named, not a folder with more in it.
    """

    place: str
    filename: str
    given: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The file, or the folder or repository that it is in."""
        return str(self._path()) if self.given else self.place

    def check(self) -> None:
        """It must be there, be one whole GGUF file, and there must be what reads it."""
        if find_spec("gguf") is None:
            raise LRQError(
                f'{self.filename} is read by the package gguf, which is not installed. Run: pip install "hf_lrq[gguf]"'
            )
        check_not_hidden(Path(self.place))
        if (part := _PART.search(self.filename)) and int(part[1]) > 1:
            raise LRQError(
                f"{self.filename} is one of {int(part[1])} parts. Join them first: llama-gguf-split --merge FIRST OUT."
            )
        if Path(self.place).is_dir() and not self._path().is_file():
            raise LRQError(f"There is no file {self._path()}.")
        if self._path().is_file():
            with open(self._path(), "rb") as file:
                if (seen := file.read(len(_MAGIC))) != _MAGIC:
                    raise LRQError(f"{self._path()} is no GGUF file: it starts with {seen!r}, not {_MAGIC!r}.")

    def config(self) -> Any:
        """Made from the file's metadata."""
        try:
            return AutoConfig.from_pretrained(self.place, gguf_file=self.filename, trust_remote_code=False)
        except Exception as error:  # Of many kinds: the reader does not expect a file that it does not know.
            raise self._refused(error) from error

    def model(self, dtype: str, device: torch.device) -> Any:
        """Its blocks as ordinary weights."""
        # Releases that can keep the blocks are to be told not to; those before know nothing else.
        keeping = getattr(transformers, "GgufConfig", None)
        extra = {} if keeping is None else {"quantization_config": keeping(dequantize=True)}
        try:
            loaded, found = model_class(self.config()).from_pretrained(
                self.place,
                gguf_file=self.filename,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map={"": device},
                output_loading_info=True,
                trust_remote_code=False,
                **extra,
            )
        except Exception as error:
            if isinstance(error, LRQError):
                raise
            raise self._refused(error) from error
        if missing := sorted(found["missing_keys"]):
            raise LRQError(f"{self.filename} lacks {len(missing)} weights of the model, such as {missing[0]}.")
        return loaded.eval()

    def tokenizer(self) -> Any:
        """Made from the file's metadata."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.place, gguf_file=self.filename, trust_remote_code=False)
        except Exception as error:
            reason = first_line(error)
        else:
            if knows_words(tokenizer):
                return tokenizer
            reason = "it knows special tokens only"
        raise LRQError(
            f"transformers cannot make a tokenizer of {self.filename}, so text cannot be turned into tokens: {reason}. "
            "hf-lrq quantize can do without: --dataset none --no-eval."
        )

    def companions(self, tokenizer: Any) -> None:
        """What else is in the folder may belong to other files."""

    def file(self) -> str:
        """Name and types of its blocks."""
        path = self._path() if Path(self.place).is_dir() else Path(hf_hub_download(self.place, self.filename))
        weights: Counter[str] = Counter()
        for tensor in import_module("gguf").GGUFReader(path).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        return f"{self.filename} (GGUF: {', '.join(name for name, _ in weights.most_common())})"

    def _path(self) -> Path:
        return Path(self.place) / self.filename

    def _refused(self, error: Exception) -> LRQError:
        if isinstance(error, OSError):
            return unavailable(self.place, error)
        return LRQError(
            f"transformers {transformers.__version__} cannot read {self.filename}: {first_line(error)} "
            "It knows the architectures that its documentation of GGUF lists."
        )


def source_of(model: str, gguf_file: str | None) -> Source:
    """What a user named.

    Args:
        model: folder, id on the Hub, or a GGUF file.
        gguf_file: name of a file in the folder or repository.

    Raises:
        LRQError: if a file is named twice.
    """
    path = Path(model).expanduser()
    if model.lower().endswith(ENDING) and not path.is_dir():
        if gguf_file is not None:
            raise LRQError(f"{model} is a file already. Give its folder with --gguf-file, or leave out --gguf-file.")
        return Gguf(str(path.parent), path.name, given=True)
    return Saved(model) if gguf_file is None else Gguf(model, gguf_file)
