"""Requests a second, and what is lost, beside other servers."""
