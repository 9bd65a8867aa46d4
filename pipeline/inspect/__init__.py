"""`python -m pipeline.inspect STORE`: what a store is and what it holds."""
