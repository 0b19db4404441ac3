"""Runs of guide and model: traces, and what tells of draws; runs on the side leave no trace."""
