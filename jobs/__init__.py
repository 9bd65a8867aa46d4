"""What is submitted to a Ray cluster."""
