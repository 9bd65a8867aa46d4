"""Images from a trained student."""
