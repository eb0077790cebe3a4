"""Integrated gradients: from a model and questions to scores."""
