"""What a model is trained to do: batches, loss as a sum and a count, metrics."""
