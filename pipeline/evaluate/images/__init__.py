"""Images to evaluate: .npz files, folders, stores, and what is known of how they were made."""
