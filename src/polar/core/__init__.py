"""What every package uses: errors, records, the template, checkpoints, text. No torch."""
