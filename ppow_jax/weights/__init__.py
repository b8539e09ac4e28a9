"""Reading and writing of weights: targets from Hugging Face directories and GGUF, drafters in the EAGLE-3 format."""
