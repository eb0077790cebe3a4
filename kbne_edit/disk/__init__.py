"""Checkpoints on disk: safetensors files, their shards, and the manifest. Imports neither torch nor a model class."""
