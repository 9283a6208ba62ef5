"""What a rank holds, beside what the formula says."""
