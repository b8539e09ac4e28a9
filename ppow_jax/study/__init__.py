"""The study: arms of stage 2 compared from one start, on the same answers, over several seeds."""
