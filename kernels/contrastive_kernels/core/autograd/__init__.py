"""Ways between the losses and torch's autograd: around its dispatcher, and the backward of gradients that are there already."""
