"""Factors fitted to sentence pairs."""
