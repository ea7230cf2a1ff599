"""Numbers that a machine gives, and how they are shown."""
