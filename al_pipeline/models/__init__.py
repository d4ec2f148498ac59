"""Classifiers: the linear model on frozen features, estimators of one's own, and the fine-tuned encoder."""
