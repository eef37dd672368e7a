"""What every experiment stands on: options, texts, ranks, tables, verdicts, and files."""
