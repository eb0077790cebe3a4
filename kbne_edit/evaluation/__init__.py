"""The effect and the cost of an edit: probes, benchmarks, neutral text, each beside its controls."""
