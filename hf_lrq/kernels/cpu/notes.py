"""What takes long says so, in one line on the terminal."""

import contextlib
import sys
import threading
from collections.abc import Iterator

NOTE_SECONDS = 1.0


@contextlib.contextmanager
def announced(text: str | None) -> Iterator[None]:
    """Print a line to standard error if what is done inside takes longer than a second; None prints nothing."""
    timer = threading.Timer(NOTE_SECONDS, _say, (text,))
    timer.daemon = True
    if text is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"hf_lrq: {text}", file=sys.stderr, flush=True)
