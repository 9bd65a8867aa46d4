"""`python -m pipeline.extract`: run the teacher and the autoencoder once over a data set."""
