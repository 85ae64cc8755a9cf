"""Doubles and image writers that ship and are tested by the same contract suites."""
