"""Evaluation of reward models: benchmarks, scoring, metrics, report."""
