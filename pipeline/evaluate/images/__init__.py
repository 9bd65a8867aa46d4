"""Images to evaluate: from .npz files, folders and stores, with the description of samples."""
