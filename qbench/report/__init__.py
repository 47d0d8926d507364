"""What a run found, for people: in words, as a table, as figures; all derived from result.json."""
