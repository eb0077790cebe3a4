"""Models in memory: loading, hooks, prompts, packed rows, and what this machine can hold."""
