"""Charts and pages of results files; see ``page`` and ``cpu``."""
