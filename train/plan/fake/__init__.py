"""The recipe's own parts over fake tensors: model, media, attention, GradCache and the step."""
