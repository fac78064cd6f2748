"""Optimizers: one file each, with a `Config` and `Optimizer(config, groups) -> torch.optim.Optimizer`."""
