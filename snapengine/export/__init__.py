"""Export of images to other formats: raw memory and ELF cores."""
