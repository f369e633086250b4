"""What every package stands on: errors, records, the template, checkpoints, text. No torch."""
