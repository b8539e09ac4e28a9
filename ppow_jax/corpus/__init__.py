"""Data that training and replays read: answers of the target, and its features and distributions over them."""
