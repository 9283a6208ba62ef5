"""A trained model leaves the house; nothing in training imports it."""
