"""The two proofs: the files hold the edit, and the model behaves as the hooks."""
