"""What the training loop needs besides data, model and optimizers."""
