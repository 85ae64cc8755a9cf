"""What happens when, and after a crash? Phases are one table; SQLite journal; one module per step."""
