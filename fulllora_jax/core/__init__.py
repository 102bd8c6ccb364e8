"""What every room needs: errors, console, files, locks, trees, statistics."""
