"""What active learning would have saved on a corpus whose labels are known: the stages' own functions, in process."""
