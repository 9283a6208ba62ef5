"""How long a run takes to its first step."""
