"""An edit and a checkpoint to a checkpoint, an adapter or a delta, and back."""
