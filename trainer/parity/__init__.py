"""The proof that every layout trains what one process would."""
