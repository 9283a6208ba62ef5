"""What lies in ``output_dir/name``, and who may write there."""
