"""Exit codes of the commands."""

USER_ERROR = 2  # Something that the user can do something about.
INTERRUPTED = 130  # 128 + SIGINT, as shells have it.
