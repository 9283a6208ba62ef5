"""How well the examples learn, over several seeds, beside what is known to be good."""
