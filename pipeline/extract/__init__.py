"""`python -m pipeline.extract`: store the outputs of teacher and autoencoder for a data set."""
