"""`python -m pipeline.inspect STORE`: summary, checks and clean-up of a store."""
