"""What belongs to a model beside its weights: tokenizer, processors, chat templates, settings. Code never does.

Saved by transformers where it can load them; the files of what it cannot load are copied as they are.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# Of transformers, written anew by models that generate, and of sentence-transformers.
SETTINGS_FILES = ("generation_config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
MODULES_FILE = "modules.json"  # Of sentence-transformers: what comes after the model, each in a folder of its own.
MODULE_FOLDER = re.compile(r"\d+_\w+")
MODULE_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Companions:
    """What lies beside the weights of a model; `save` takes it for a tokenizer.

    Attributes:
        source: folder or id on the Hub.
        tokenizer: None where there is none, or none that can be loaded.
        processor: of whichever kind, likewise.
        obstacle: why the processor cannot be loaded, where that is so.
    """

    source: str
    tokenizer: Any = None
    processor: Any = None
    obstacle: str | None = None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write everything into a folder; what a model writes itself is to be written afterwards."""
        target = Path(folder)
        # The processor last: it saves a tokenizer of its own, as it uses it.
        for part in (self.tokenizer, self.processor):
            if part is not None:
                part.save_pretrained(target)
        for name in self.copied():
            # A loaded part wrote it in the way of the running release.
            if not (target / name).exists():
                (target / name).parent.mkdir(exist_ok=True)
                found = find_file(self.source, name)
                assert found is not None, "listed because it is there"
                shutil.copyfile(found, target / name)

    def copied(self) -> list[str]:
        """Names of the files that are not written by a loaded part."""
        names = [*SETTINGS_FILES]
        whole = isinstance(self.processor, ProcessorMixin)
        if not whole:
            names += PROCESSOR_FILES
        if self.tokenizer is None and not whole:
            names += [*TOKENIZER_FILES, *TEMPLATE_FILES]
        return [name for name in (*names, *self._modules()) if find_file(self.source, name) is not None]

    def code(self) -> list[str]:
        """Names of the files of code that tokenizer or processor call for, which are not copied."""
        named = set()
        for name in (*PROCESSOR_FILES, "tokenizer_config.json"):
            known = _json(find_file(self.source, name)).get("auto_map")
            for entry in known.values() if isinstance(known, dict) else ():
                places = entry if isinstance(entry, list) else [entry]
                named |= {place.rpartition("--")[2].partition(".")[0] for place in places if isinstance(place, str)}
        return sorted(f"{module}.py" for module in named)

    def _modules(self) -> Iterator[str]:
        found = find_file(self.source, MODULES_FILE)
        if found is None:
            return
        yield MODULES_FILE
        for module in _json(found).get("", []):
            path = module.get("path") if isinstance(module, dict) else None
            # What a file names is a folder of the model, or nothing.
            if isinstance(path, str) and MODULE_FOLDER.fullmatch(path):
                yield from (f"{path}/{name}" for name in MODULE_FILES)


def companions_of(source: str, tokenizer: Any = None) -> Companions:
    """Find what lies beside a model; its own code is never run.

    Args:
        source: folder or id on the Hub.
        tokenizer: as it has been loaded, if it can be.
    """
    if all(find_file(source, name) is None for name in PROCESSOR_FILES):
        return Companions(source, tokenizer)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # Of many kinds, and none is a reason to lose a model: the files are copied.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Companions(source, tokenizer, obstacle=reason[0])
    # Of files that it does not know it makes a tokenizer, where it can.
    return Companions(source, tokenizer, None if isinstance(processor, PreTrainedTokenizerBase) else processor)


def find_file(source: str, name: str) -> Path | None:
    """The path of a file of a model, from its folder or the Hub; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def _json(path: Path | None) -> dict[str, Any]:
    """The object in a file, a list under the name ""; empty where there is no file or no JSON."""
    try:
        found = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {"": found if isinstance(found, list) else []}
