"""Layouts of quantised checkpoints, one small class each: what carries a neuron's multiplier, and how to read it."""
