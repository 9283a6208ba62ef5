"""What a step does to weights: update, schedule, average."""
