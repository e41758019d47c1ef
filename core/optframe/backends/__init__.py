"""The backends that need nothing beyond the core's dependencies; each is imported only when used."""
