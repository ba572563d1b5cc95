"""Guest images: built from distribution packages, addressed by content, cached."""
