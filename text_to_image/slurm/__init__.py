"""What job.sh is made of: the shell files that it sources, and the Python modules that it asks."""
