"""The folder of a run: config, metrics, summary, evaluations, samples, and reading them back."""
