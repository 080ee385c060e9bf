"""Training: losses, vocabulary rule, data, student model, trainer."""
