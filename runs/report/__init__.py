"""report.html: one self-contained page about one run or several, made from their folders alone. See docs/report.md."""
