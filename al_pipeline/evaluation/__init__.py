"""Evaluation of models: metrics with intervals, comparison, promotion, prequential accuracy, labels saved."""
