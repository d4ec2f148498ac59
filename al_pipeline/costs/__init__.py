"""What answers cost and bring: the seconds of an answer, the budget, a forecast of the next round."""
