"""`python -m pipeline.quickstart`: from a folder of images to three commands that fit them."""
