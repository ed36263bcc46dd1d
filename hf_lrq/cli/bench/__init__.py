"""`hf-lrq bench`: how fast compressed layers and models are here, and what compression costs in predictions."""
