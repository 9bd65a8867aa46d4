"""How far generated images are from real ones: Fréchet distances, scores, precision and recall."""
