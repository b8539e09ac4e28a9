"""Losses, rewards and advantages as small pure functions."""
