"""The two proofs: the file is the edit, and the model behaves as the hooks."""
