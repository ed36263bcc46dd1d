"""`hf-lrq bench`: how fast compressed layers and models are here, each figure a ratio inside one run."""
