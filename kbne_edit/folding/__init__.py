"""Applies an edit to a checkpoint: as a checkpoint, an adapter or a delta, and back."""
