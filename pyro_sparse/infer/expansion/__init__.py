"""Which values a site is given, in which dims, with which weights."""
