"""A student learns from a teacher: a trained model, found, laid on ranks and asked beside the loss of the task."""
