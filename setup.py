"""For tools that need a setup.py. pyproject.toml describes the package."""

from setuptools import setup

setup()
