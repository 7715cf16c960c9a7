"""Files that are whole or absent, folders that prunet recognises as its own, and pages that are read within limits."""
