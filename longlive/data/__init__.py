"""What models are fed: prompt files, clips, scenes of worlds, and in which order."""
