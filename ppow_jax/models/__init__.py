"""Pure functions over parameter pytrees: the frozen target and the EAGLE-3 drafter."""
