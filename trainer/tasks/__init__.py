"""What is learnt: batch, forward, loss, evaluation."""
