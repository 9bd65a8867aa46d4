"""What ``pipeline.files`` is made of: connections, faults, retries, credentials."""
