"""What a run and a sweep show at their end: tables, curves, cards."""
