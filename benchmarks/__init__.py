"""Claims about speed and size: scripts that compare side by side in one run."""
