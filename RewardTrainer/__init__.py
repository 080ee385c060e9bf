"""Stages 3 and 4: train a discriminative reward model on scored pairs, then evaluate it."""
