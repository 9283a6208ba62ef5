"""More ranks beside fewer."""
