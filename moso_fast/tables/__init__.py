"""Score tables: files, selection, reports and plots. Knows no kernel and no model."""
