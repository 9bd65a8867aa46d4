"""Pictures of samples and of attention maps."""
