"""Signs that a terminal cannot show, written in other ones. Nothing heavy is imported, as every message needs it."""

import codecs
import io
from typing import TextIO

SIGNS = "hf_lrq.signs"  # Of the error handler, where a stream is opened or encoded to.

_INSTEAD = {"±": "+/-", "×": "x", "–": "-", "—": "-", "−": "-", "·": "*", "≈": "~", "→": "->", "…": "..."}


def spell_out(streams: "tuple[TextIO, ...]") -> None:
    """Make these streams write what they cannot encode in signs they can, instead of failing."""
    codecs.register_error(SIGNS, _instead)
    for stream in streams:
        # Others, of tests and of notebooks, take all of Unicode.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SIGNS)


def shown(text: str, stream: TextIO) -> str:
    """The text as the stream will show it, which may be of another width."""
    if getattr(stream, "errors", None) != SIGNS:
        return text
    return text.encode(stream.encoding, SIGNS).decode(stream.encoding)


def _instead(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "the handler is for writing"
    part = error.object[error.start : error.end]
    # A surrogate or a letter: as Python writes it in a string.
    signs = (_INSTEAD.get(sign) or sign.encode("ascii", "backslashreplace").decode("ascii") for sign in part)
    return "".join(signs), error.end
