"""The model source and the Hub: from `--in` to a local directory, and from a baked directory to the Hub."""
