"""Repeated, paired runs that show whether a technique pays."""
