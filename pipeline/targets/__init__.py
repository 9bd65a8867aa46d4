"""What a store keeps of a teacher (cuts), and the way from it back to training targets."""
