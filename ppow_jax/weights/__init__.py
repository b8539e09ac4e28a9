"""Weights in and out: targets from Hugging Face directories and GGUF, drafters in the EAGLE-3 format."""
