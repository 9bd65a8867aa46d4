"""The training core, for one process or many; only ``ray_trainer`` imports Ray."""
