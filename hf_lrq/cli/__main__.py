"""`python -m hf_lrq.cli`."""

from hf_lrq.cli import main

main()
