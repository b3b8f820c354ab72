"""What every script stands on: errors and exit codes, flags, whole files, locks, signals, processes, devices."""
