"""Scorers: modules that give a logit to a row, of frozen features or on a backbone's states, and what a folder of one holds."""
