"""What saving costs training, and how fast state is read back."""
