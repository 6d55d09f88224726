"""What every implementation of the losses shares: a call as a problem, its softmax, its gradients, its ranks."""
