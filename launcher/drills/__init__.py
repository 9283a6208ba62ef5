"""``shardline drill``: a fault on purpose against a short run, and whether its outcome is the undisturbed run's."""
