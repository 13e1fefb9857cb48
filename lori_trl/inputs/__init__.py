"""What comes from outside, read with care: files, YAML, plain values, intervals."""
