"""Charts and pictures as SVG, the same in a page and in a file of their own."""
