"""Fits factors to sentence pairs."""
