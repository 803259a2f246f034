"""Files that others wrote, read with bounds and with errors that name the file."""
