"""Stage 2: preference strength of original pairs; self-calibrated score of refined ones; margins and ties."""
