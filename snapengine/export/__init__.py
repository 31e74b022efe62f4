"""What other tools read: raw memory and ELF cores."""
