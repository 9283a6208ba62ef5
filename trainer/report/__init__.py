"""report.html: a run, or several compared, as one page that needs no network. Imports no torch."""
