"""Conversations, their token ids and masks, and batches of fixed shape."""
