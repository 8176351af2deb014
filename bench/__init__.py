"""Measurements of the training step against its peers; see README.md beside this file."""
