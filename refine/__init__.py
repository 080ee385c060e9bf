"""Stage 1: generate responses; diagnose rejected ones and edit them minimally."""
