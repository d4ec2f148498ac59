"""How good the labels are: agreement of annotators, their estimated accuracy, and who differs from the others."""
