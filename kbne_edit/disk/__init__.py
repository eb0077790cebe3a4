"""Checkpoints on disk: safetensors files, their shards, and the manifest. No torch, no model class."""
