"""How good a model is: metrics with intervals, comparison, promotion, accuracy while it is used, labels saved."""
