"""Layouts of quantised checkpoints, one small class each: which tensor carries a neuron's factor, and how."""
