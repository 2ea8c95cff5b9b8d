"""The experiment pipeline: from raw text to trials, records and the report."""
