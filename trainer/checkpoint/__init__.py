"""Canonical state to storage and back."""
