"""Command lines: options, config files, and how a command ends."""
