"""The training core: one plain process or many, with no ray but in the adapter."""
