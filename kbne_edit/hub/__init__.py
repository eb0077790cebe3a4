"""The Hub and the model source: `--in` to a local directory, and a baked directory to the Hub."""
