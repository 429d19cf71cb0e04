"""latentfast inside other libraries: a subpackage for each, imported by those who use it alone."""
