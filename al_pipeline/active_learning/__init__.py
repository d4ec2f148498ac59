"""Selection of the items to label next: arrays in, selected items out. Independent of models, files and the network."""
