"""Scores of generated images, and the variational bound of a network."""
