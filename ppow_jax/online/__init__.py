"""Online adaptation: the drafter learns from what it helped to decode, within a budget of time, while it serves."""
