"""Generic graph passes, one a file, and the pipelines made of them."""
