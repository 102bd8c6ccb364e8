"""Comparisons of methods: runs over rows and seeds, and one table of them."""
