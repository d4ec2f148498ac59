"""Classifiers: the linear model on frozen features, plug-in estimators, and the fine-tuned encoder."""
