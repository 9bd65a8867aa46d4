"""A Ray cluster of several nodes on this machine, and the drill of losing them."""
