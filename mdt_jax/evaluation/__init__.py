"""Scores of a trained network and of its images."""
