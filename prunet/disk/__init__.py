"""Files that are whole or not there, folders that say whose they are, and pages that are read within bounds."""
