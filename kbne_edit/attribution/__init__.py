"""Integrated gradients: questions and a model to scores."""
