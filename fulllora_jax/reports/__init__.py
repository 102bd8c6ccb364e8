"""What people read: report.md and report.html, and their pictures."""
