"""What every script needs: errors and exit codes, flags, atomic file writes, locks, signals, processes, devices."""
