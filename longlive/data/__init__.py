"""What models are fed: prompt files."""
