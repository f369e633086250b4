"""Reading and writing of rows: sources, formats, fields."""
