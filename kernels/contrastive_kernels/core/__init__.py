"""What every implementation of the losses splits: a call as a problem, its softmax, its gradients, its ranks."""
