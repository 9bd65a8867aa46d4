"""Examples for readers: loops of one's own on a store."""
