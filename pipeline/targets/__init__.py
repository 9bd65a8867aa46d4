"""Cuts: teacher tensors that a store holds, and training targets computed from them."""
