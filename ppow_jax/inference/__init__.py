"""The decoding engine: a model and its requests, batches of prompts, timed decoding, cost tables, traces."""
