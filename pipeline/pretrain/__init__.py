"""Small networks trained on the images themselves: teacher, autoencoder and classifier."""
