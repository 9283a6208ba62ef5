"""A trained model answers over HTTP; nothing in training imports it, and what answers for rows loads no torch."""
