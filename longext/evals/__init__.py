"""Evaluations: what is measured, under which protocol."""
